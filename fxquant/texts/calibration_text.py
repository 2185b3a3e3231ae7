"""The built-in calibration text; `README.md` in this folder states provenance and rights."""

from importlib import resources

from fxquant.errors import OptionError

PASSAGES = 256  # in the file


def calibration_text(count: int = 128) -> list[str]:
    """Short passages of several registers and languages, to calibrate a text model on.

    What is fitted to one kind of text is worse on others: put some of these passages among rows of
    your own text. They also serve where you have no text at all. For an
    encoder a passage is a row; for a language model, join them and cut the tokens into rows.

    Args:
        count: how many passages, at most 256. Languages, documentation, speeches and source code
            take turns, so that any number is a mixture.

    Returns:
        The first `count` passages, each 30 to 300 characters long; source code has line breaks.

    Raises:
        OptionError: there are not so many.
    """
    if type(count) is not int or not 1 <= count <= PASSAGES:
        raise OptionError(
            "calibration_text",
            found=f"count={count!r}",
            needed=f"a number from 1 to {PASSAGES}",
            remedy="Add text of your own where that is not enough: it tells more.",
        )
    text = resources.files(__package__).joinpath("mixed.txt").read_text("utf-8")
    return text.rstrip("\n").split("\n\n")[:count]
