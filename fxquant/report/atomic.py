"""Put a file or a folder in place at once or not at all, as a good tool does.

A symbolic link stays one: what it points to is replaced. The mode of an old file is kept. Only
regular files are replaced. A temporary file lies beside its target and is locked while it is
written; one that a killed process left is not locked, and the next save to the same path removes
it.
"""

import contextlib
import errno
import os
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from fxquant.errors import SaveError, cause_of, check_path

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be removed anyway
    fcntl = None  # type: ignore[assignment]


def write_atomically(path: str | os.PathLike[str], write: Callable[[str], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place.

    Raises:
        SaveError: the folder is missing or read-only, the disk is full, or something other than a
            file is at `path`; an old file is kept.
    """
    check_path("path", path, SaveError)
    temporary = handle = None
    try:
        target = Path(os.path.realpath(path))
        old = _status(target)
        prefix = f".fxquant-{zlib.crc32(os.fsencode(target.name)):08x}-"
        _remove_left_over(target.parent, prefix)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=prefix)
        with contextlib.suppress(OSError):  # some network folders know no locks
            _lock(handle)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if old is not None and hasattr(os, "chown"):
            with contextlib.suppress(OSError):  # only root may give a file away
                os.chown(temporary, old.st_uid, old.st_gid)
        os.chmod(temporary, 0o666 & ~_umask() if old is None else stat.S_IMODE(old.st_mode))
        os.replace(temporary, target)
        temporary = None
    except (OSError, SafetensorError, ValueError) as error:
        raise _not_written(path, error) from error
    finally:
        if handle is not None:
            os.close(handle)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as UTF-8, at once or not at all; line ends stay as they are.

    Raises:
        SaveError: as in `write_atomically`.
    """
    write_atomically(path, lambda new: Path(new).write_bytes(text.encode()))


def write_folder_atomically(path: str | os.PathLike[str], write: Callable[[str], None]) -> None:
    """Let `write` fill a temporary folder beside `path`, then put it in place.

    Raises:
        SaveError: something is at `path` already (a folder may hold what nobody wants to lose), the
            folder around it is missing or read-only, or the disk is full.
    """
    check_path("path", path, SaveError)
    temporary = handle = None
    try:
        target = Path(os.path.realpath(path))
        check_free_folder(path)
        prefix = f".fxquant-{zlib.crc32(os.fsencode(target.name)):08x}-"
        _remove_left_over(target.parent, prefix)
        temporary = tempfile.mkdtemp(dir=target.parent, prefix=prefix)
        if hasattr(os, "O_DIRECTORY"):  # elsewhere a folder cannot be opened, nor locked
            handle = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY)
            with contextlib.suppress(OSError):
                _lock(handle)
        write(temporary)
        os.chmod(temporary, 0o777 & ~_umask())
        os.replace(temporary, target)
        temporary = None
    except (OSError, SafetensorError) as error:
        raise _not_written(path, error) from error
    finally:
        if handle is not None:
            os.close(handle)
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _not_written(path: str | os.PathLike[str], error: Exception) -> SaveError:
    return SaveError(
        os.fspath(path),
        found=f"that writing it failed: {cause_of(error)}",
        needed="a folder that exists, can be written and has space",
        remedy="Create the folder, free some space, or choose another path.",
    )


def check_free_folder(path: str | os.PathLike[str]) -> None:
    """Raise a `SaveError` unless nothing, or an empty folder, is at `path`."""
    target = Path(os.path.realpath(path))
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise SaveError(
            os.fspath(path),
            found="something there already",
            needed="a path that is free, or an empty folder",
            remedy="Remove it, or choose another path.",
        )


def check_replaceable(path: str | os.PathLike[str]) -> None:
    """Raise a `SaveError` if something other than a regular file is at `path`."""
    check_path("path", path, SaveError)
    with contextlib.suppress(OSError, ValueError):  # writing will say it
        _status(Path(os.path.realpath(path)))


def _status(target: Path) -> os.stat_result | None:
    """What is at `target`; None if nothing is."""
    try:
        status = target.stat()
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    kind = kind_of(status.st_mode)
    if kind is not None:
        raise SaveError(
            str(target),
            found=kind,
            needed="a file, or nothing, at this path",
            remedy="Choose the path of a file.",
        )
    return status


def kind_of(mode: int) -> str | None:
    """What is at a path, in words, unless it is a regular file."""
    if stat.S_ISREG(mode):
        return None
    names = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return names.get(stat.S_IFMT(mode), "a device")


def _remove_left_over(folder: Path, prefix: str) -> None:
    """Remove temporaries of processes that were killed."""
    for path in folder.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # locked by a save that runs, or removed by another
            status = os.lstat(path)
            is_folder = stat.S_ISDIR(status.st_mode)
            if not is_folder and not stat.S_ISREG(status.st_mode):
                continue
            handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
            try:
                _lock(handle)
                if is_folder:
                    shutil.rmtree(path)
                else:
                    path.unlink()
            finally:
                os.close(handle)


def _lock(handle: int) -> None:
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
