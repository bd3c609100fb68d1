"""A folder that a long command fills shard by shard, and that looks finished only when it is.

`unfinished.json` is there from the first moment to the last and holds the recipe: everything that decides the content.
`shard-000000.done.json` follows each completed shard. A rerun with the same recipe keeps the shards that are done.
At the end `set.json` is written from the records, then the markers go; a rerun deletes those that a kill left.
"""

import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from latentsmith.files.atomic import remove_incomplete, write_text
from latentsmith.files.errors import BadInput
from latentsmith.files.json import read_json
from latentsmith.files.lock import LOCK_FILE, locked, locked_folder, remove_stale_locks

from .shards import SET_FILE, UNFINISHED_FILE, ShardRecord, shard_name, write_set_file

FINISH_LOCK = f"{LOCK_FILE}-finish"


@contextmanager
def locked_output(folder: Path, rank: int = 0, processes: int = 1) -> Iterator[None]:
    """Lock a folder inside the context: for one process alone, or this rank's share where several fill it.

    Raises BadInput that names the holder where another command, or the same one, fills it.
    """
    with ExitStack() as held:
        held.enter_context(locked_folder(folder, shared=processes > 1))
        if processes > 1:
            held.enter_context(locked(folder / f"{LOCK_FILE}-{rank}", folder))
        yield


class ResumableOutput:
    """Opens `folder` to be filled by `recipe`, or to go on with it.

    recipe: a JSON object of strings, numbers and nested objects. shared: whether other processes fill it too, at the
    same time. BadInput if the folder holds anything else: other files, or a set begun or finished by another recipe
    (the first differing entry is named). The caller holds `locked_output`.
    """

    def __init__(self, folder: str | os.PathLike[str], recipe: Mapping[str, Any], *, shared: bool = False):
        self.folder, self.shared = Path(folder), shared
        self.recipe = json.loads(json.dumps(recipe))
        self.is_finished = self._open()

    def _open(self) -> bool:
        marker, whole = self.folder / UNFINISHED_FILE, self.folder / SET_FILE
        if whole.exists():
            self._compare(_read_json(whole).get("recipe", {}))
            with self.finishing() as is_mine:
                if is_mine:
                    self._tidy()
            return True
        if marker.exists():
            if self.shared or self.done_numbers():
                self._compare(_read_json(marker))
            else:  # nothing is made yet, so a corrected source or option may start anew
                write_text(marker, json.dumps(self.recipe, indent=1) + "\n")
            if not self.shared:  # another's file under way looks the same
                remove_incomplete(self.folder)
        elif self.folder.exists() and (not self.folder.is_dir() or self._holds_files()):
            raise BadInput(f"{self.folder}: already holds something else; name a new folder or an empty one")
        else:
            if not self.shared:
                remove_incomplete(self.folder)
            write_text(marker, json.dumps(self.recipe, indent=1) + "\n")
        return False

    def _holds_files(self) -> bool:
        begun = f".{UNFINISHED_FILE}."  # what a kill before the first rename leaves, or another process is writing
        return any(not path.name.startswith((LOCK_FILE, begun)) for path in self.folder.iterdir())

    def _compare(self, before: Mapping[str, Any]) -> None:
        difference = first_difference(before, self.recipe)
        if difference:
            name, old, new = difference
            what = f"was begun with {name} {_short(old)}, and now it is {_short(new)}"
            raise BadInput(f"{self.folder}: {what}; name a new folder, or delete this one to start again")

    def done(self, number: int) -> dict[str, Any] | None:
        """Return what was recorded of shard `number`, None if it is yet to be made."""
        try:
            return _read_json(self._done_path(number))
        except FileNotFoundError:
            return None

    def done_numbers(self) -> set[int]:
        """Return the numbers of all shards that are done, by whichever process."""
        return {int(path.name[6:].partition(".")[0]) for path in self.folder.glob("shard-*.done.json")}

    @property
    def is_whole(self) -> bool:
        """Return whether another process has finished the folder."""
        return self.shared and (self.folder / SET_FILE).exists()

    def record(self, number: int, shard: ShardRecord, **more: Any) -> None:
        """Mark shard `number`, already in place, as done; `more` is for the command's own use on a rerun."""
        write_text(self._done_path(number), json.dumps({"shard": asdict(shard), **more}))

    @contextmanager
    def finishing(self) -> Iterator[bool]:
        """Yield whether this process is the one, of those that fill the folder, that finishes it, inside the context.

        The lock of a process that was killed in the act is free at once.
        """
        with ExitStack() as held:
            is_mine = True
            if self.shared:
                try:
                    held.enter_context(locked(self.folder / FINISH_LOCK, self.folder))
                except BadInput:
                    is_mine = False
            yield is_mine

    def finish(self, shards: Sequence[ShardRecord]) -> None:
        """Turn the folder into a finished set. Every other file of it must be in place already."""
        write_set_file(self.folder, shards, recipe=self.recipe)
        self._tidy()

    def _tidy(self) -> None:
        """Delete what a finished folder needs no more, and what killed processes left in it."""
        for path in [self.folder / UNFINISHED_FILE, *self.folder.glob("shard-*.done.json")]:
            path.unlink(missing_ok=True)
        remove_incomplete(self.folder)
        remove_stale_locks(self.folder, f"{LOCK_FILE}-*")

    def _done_path(self, number: int) -> Path:
        return (self.folder / shard_name(number)).with_suffix(".done.json")


def first_difference(before: Any, now: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Return the first entry in which two JSON values differ, as (dotted name, before, now); None if they are equal."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in [*now, *(key for key in before if key not in now)]:
            found = first_difference(before.get(key), now.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return None
    return None if before == now else (name, before, now)


@contextmanager
def full_disk_reported(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the system's "no space left" into BadInput; what is complete in `folder` stays."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise BadInput(f"{folder}: the disk is full; free some space and run the command again to go on") from None


def _read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object that we wrote. Raises FileNotFoundError where another process has finished the folder."""
    if not path.exists():
        raise FileNotFoundError(path)
    return read_json(path, "what we write (delete the folder and make it again)")


def _short(value: Any) -> str:
    return "(absent)" if value is None else json.dumps(value, ensure_ascii=False)
