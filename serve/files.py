"""Deletes what generations leave behind: a run folder with its cached files, or its checkpoints; nothing else."""

import errno
import shutil
from pathlib import Path

from raydream.store.run_folder import CHECKPOINTS
from raydream.store.storage import LocalFiles, resolve
from serve.settings import Settings

_MIB = 2**20
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_WORDS = ("No space left on device", "Disk quota exceeded", "database or disk is full")


class GenerationFiles:
    """The run folders of one service."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def delete(self, generation_id: str) -> None:
        """The run folder and its cache. ``ValueError`` while somebody works in it, or where it is a link."""
        self._delete_folder(generation_id)
        shutil.rmtree(self._settings.cache / generation_id, ignore_errors=True)

    def delete_checkpoints(self, generation_id: str) -> None:
        """What only a run that goes on needs."""
        self._delete_folder(f"{generation_id}/{CHECKPOINTS}")

    def size_bytes(self, generation_id: str) -> int:
        return sum(resolve(self._settings.runs_uri, None).sizes(generation_id).values())

    def want_of_room(self) -> str:
        """In words, for everybody, that the disk is nearly full; empty where it is not, or where storage has no end."""
        files = resolve(self._settings.runs_uri, None)
        places = [Path(self._settings.data), *([files.root] if isinstance(files, LocalFiles) else [])]
        free_mib = min(shutil.disk_usage(place).free for place in places if place.is_dir()) // _MIB
        if free_mib >= self._settings.min_free_mib:
            return ""
        needed = f"nothing is started below {self._settings.min_free_mib} MiB"
        return f"waiting for room on the service's disk: {free_mib} MiB are free, {needed}"

    def _delete_folder(self, name: str) -> None:
        files = resolve(self._settings.runs_uri, None)
        if isinstance(files, LocalFiles):
            if not files.path(name).is_dir():
                return
            try:
                with LocalFiles(files.root / name.partition("/")[0]).lock():
                    files.delete_folder(name)
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                files.delete_folder(name)  # there is no room for the lock's text, which this makes
        elif files.sizes(name):
            files.delete_folder(name)


def is_for_want_of_room(error: BaseException) -> bool:
    """Whether a run ended because a disk was full, here or, told in words, in an actor's process."""
    is_full = isinstance(error, OSError) and error.errno in _FULL
    is_told = any(words in str(error) for words in _FULL_WORDS)
    return is_full or is_told or (error.__cause__ is not None and is_for_want_of_room(error.__cause__))
