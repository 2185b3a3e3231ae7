"""The built-in calibration text; `README.md` in this folder states provenance and rights."""

from collections.abc import Collection
from importlib import resources

from fxquant.errors import OptionError

# Each is a file of passages with blank lines between them.
REGISTERS = (
    "languages", "source code", "prose", "documentation", "speeches", "everyday", "drama", "verse",
    "data", "chinese", "german", "spanish", "russian",
)  # fmt: skip


def calibration_text(
    count: int | None = 512, registers: Collection[str] | None = None
) -> list[str]:
    """Short passages of many registers and languages, to calibrate a text model on.

    What is fitted to one kind of text is worse on others: put some of these passages among rows of
    your own text. They also serve where you have no text at all. For an
    encoder a passage is a row; for a language model, join them and cut the tokens into rows.

    Args:
        count: how many passages; None for all, about 1,270. 512 are some 25,000 tokens of a
            WordPiece tokenizer. Registers take turns, so that any number is a mixture.
        registers: of which; all of them by default: prose, drama, verse, speeches, everyday
            (news, letters, talk, instructions), documentation, source code, data (logs, tables,
            mark-up, formulas), chinese, german, russian, spanish, and languages, which are 74
            others.

    Returns:
        The first `count` passages, each 30 to 300 characters long; some have line breaks.

    Raises:
        OptionError: there are not so many, or no such register.
    """
    chosen = REGISTERS if registers is None else tuple(registers)
    if not chosen or not set(chosen) <= set(REGISTERS):
        raise _wrong(f"registers={registers!r}", f"some of {', '.join(REGISTERS)}")
    found = []
    for name in chosen:
        file = resources.files(__package__).joinpath(f"{name.replace(' ', '_')}.txt")
        passages = file.read_text("utf-8").rstrip("\n").split("\n\n")
        found += [((i + 0.5) / len(passages), passage) for i, passage in enumerate(passages)]
    if count is None:
        count = len(found)
    if type(count) is not int or not 1 <= count <= len(found):
        raise _wrong(f"count={count!r}", f"a number from 1 to {len(found)}, or None")
    # Each register is spread evenly over all of them.
    return [passage for _, passage in sorted(found, key=lambda item: item[0])][:count]


def _wrong(found: str, needed: str) -> OptionError:
    remedy = "Add text of your own where that is not enough: it tells more."
    return OptionError("calibration_text", found=found, needed=needed, remedy=remedy)
