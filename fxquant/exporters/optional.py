"""Libraries that are needed for one format only."""

import importlib
from typing import Any

from fxquant.errors import OptionError


def optional_library(name: str, extra: str, purpose: str) -> Any:
    """The module `name`, imported when it is needed.

    Args:
        name: of the module.
        extra: of fxquant, which installs it.
        purpose: what it is needed for, for the error.

    Raises:
        OptionError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise OptionError(
            name,
            found=f"that it cannot be imported ({error})",
            needed=f"it, {purpose}",
            remedy=f"pip install 'fxquant[{extra}]'",
        ) from error
