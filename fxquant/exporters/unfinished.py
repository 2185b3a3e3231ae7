"""A folder that is written shard by shard, and can be gone on with after its process was killed.

The shards lie in `NAME.unfinished` beside the target until all is there: only then the folder gets
its name. A shard counts when its file has its final name, which it gets after its data are on the
disk.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fxquant.errors import SaveError
from fxquant.exporters.shards import METADATA, shard_name, write_index
from fxquant.report.atomic import check_free_folder

UNFINISHED_SUFFIX = ".unfinished"
NOTES = ".fxquant"  # a folder for what is known of shards; removed at the end
RUN = "run.json"  # what the shards are made of and how


class UnfinishedFolder:
    """The folder on its way.

    Args:
        target: what it will be called; free, or an empty folder.
        run: plain data that says what is made of what: another run does not go on with it.
        count: of shards.
        resume: whether to go on with what an interrupted run left; else it is removed.

    Raises:
        SaveError: something is at `target`, another run was interrupted there, or nothing can be
            written.
    """

    def __init__(self, target: Path, run: Mapping[str, Any], count: int, *, resume: bool) -> None:
        self.target = Path(os.path.realpath(target))
        self.path = self.target.with_name(self.target.name + UNFINISHED_SUFFIX)
        self.count = count
        check_free_folder(target)
        known = self._known_run()
        if not resume or known is None:
            shutil.rmtree(self.path, ignore_errors=True)
        elif known != json.loads(json.dumps(run)):
            raise SaveError(
                os.fspath(self.path),
                found="an interrupted run of another source or other options",
                needed="one of the same run, to go on with",
                remedy="Pass resume=False to remove it, or choose another target.",
            )
        try:
            (self.path / NOTES).mkdir(parents=True, exist_ok=True)
            if known is None or not resume:
                _write_text(self.path / NOTES / RUN, json.dumps(run))
        except OSError as error:
            raise self._not_written(error) from error

    def notes(self, number: int) -> dict[str, Any] | None:
        """What was noted of a finished shard; None where it has to be made."""
        if not self.shard(number).exists():
            return None
        noted: dict[str, Any] = json.loads(self._note(number).read_text("utf-8"))
        return noted

    def names(self) -> dict[str, Path]:
        """The tensors of the finished shards, and the file of each."""
        known = ((number, self.notes(number)) for number in range(self.count))
        return {
            name: self.shard(number)
            for number, notes in known
            if notes is not None
            for name in notes["names"]
        }

    def write(self, number: int, tensors: dict[str, Tensor], notes: Mapping[str, Any]) -> Path:
        """Write a shard that does not count yet; its path.

        Raises:
            SaveError: the disk is full, or the folder cannot be written.
        """
        path = self.path / NOTES / f"shard-{number}"
        try:
            save_file(tensors, path, METADATA)
            with path.open("rb") as file:
                os.fsync(file.fileno())
            _write_text(self._note(number), json.dumps({**notes, "names": list(tensors)}))
        except OSError as error:
            raise self._not_written(error) from error
        return path

    def accept(self, number: int) -> None:
        """Let a shard that was written count."""
        os.replace(self.path / NOTES / f"shard-{number}", self.shard(number))

    def finish(self, total_bytes: int) -> None:
        """Write the index of the shards, and give the folder its name.

        Args:
            total_bytes: of all tensors.
        """
        try:
            shards = [(self.notes(number) or {})["names"] for number in range(self.count)]
            write_index(self.path, shards, total_bytes)
            shutil.rmtree(self.path / NOTES)
            os.replace(self.path, self.target)
        except OSError as error:
            raise self._not_written(error) from error

    def shard(self, number: int) -> Path:
        """The file of a shard, which is there once it counts."""
        return self.path / shard_name(number, self.count)

    def _note(self, number: int) -> Path:
        return self.path / NOTES / f"shard-{number}.json"

    def _known_run(self) -> Any:
        """What an interrupted run made; None where there is none."""
        try:
            return json.loads((self.path / NOTES / RUN).read_text("utf-8"))
        except (OSError, ValueError):
            return None

    def _not_written(self, error: Exception) -> SaveError:
        return SaveError(
            os.fspath(self.path),
            found=f"that it cannot be written: {error}",
            needed="a folder that exists, can be written and has space",
            remedy="Free some space and call again: what is there already is gone on with.",
        )


def _write_text(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)
