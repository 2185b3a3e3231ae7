"""What an export would lose: found before anything is written."""

from collections.abc import Iterable
from dataclasses import dataclass

from fxquant.errors import SaveError

SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """One thing that a format cannot hold, or that a runtime of it is known not to accept.

    Attributes:
        where: the layer, or the option.
        problem: what would be lost or not work.
        remedy: what the caller can do.
        is_loss: whether the export is refused. Otherwise the files are exact, and a runtime that
            `problem` names cannot use them.
    """

    where: str
    problem: str
    remedy: str
    is_loss: bool = True

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}. {self.remedy}"


def refuse_losses(format: str, findings: Iterable[Finding]) -> None:
    """Raise a `SaveError` if one of `findings` is a loss; it names the first few of them."""
    losses = [finding for finding in findings if finding.is_loss]
    if not losses:
        return
    problems = list(dict.fromkeys(finding.problem for finding in losses))
    places = ", ".join(finding.where for finding in losses[:SHOWN])
    more = f" and {len(losses) - SHOWN} more" if len(losses) > SHOWN else ""
    remedies = dict.fromkeys(finding.remedy for finding in losses)
    raise SaveError(
        f"export to {format}",
        found=f"{'; '.join(problems[:SHOWN])} ({places}{more})",
        needed="a model that the format holds without loss",
        remedy=" ".join([*list(remedies)[:SHOWN], "fxquant.check_export lists every finding."]),
    )
