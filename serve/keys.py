"""API keys: whoever has one sees its own generations. The file holds hashes only.

python -m serve.keys add ALICE      prints a new key, once
python -m serve.keys remove ALICE
python -m serve.keys list
"""

import argparse
import hashlib
import hmac
import json
import os
import re
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from serve.settings import Settings

_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
_PREFIX = "rd_"


class KeysAway(Exception):
    """The file of keys cannot be read at the moment: nobody is let in."""


class Keys:
    """Names by hash of key, read anew whenever the file has changed. Once there were keys, they stay needed, whatever
    becomes of the file.

    A key has 256 random bits, so that a plain hash cannot be turned back; no slow one is needed.
    """

    def __init__(self, file: Path, is_closed: bool = False) -> None:
        """``is_closed``: there were keys when the service was started."""
        self._file, self._is_closed = file, is_closed
        self._stamp: tuple[int, int] | None = None
        self._hashes: dict[str, str] = {}

    @property
    def are_needed(self) -> bool:
        """Whether there is, or was, a file of keys; one that holds none lets nobody in."""
        self._is_closed = self._is_closed or os.path.lexists(self._file)
        return self._is_closed

    def owner_of(self, key: str) -> str | None:
        """The name that a key belongs to; as slow for every wrong key. ``KeysAway`` where there is no telling."""
        self._refresh()
        if self._stamp is None:
            raise KeysAway("the file of API keys is gone; put it back, or add a key by `python -m serve.keys add NAME`")
        offered, owner = _hash(key), None
        for name, known in self._hashes.items():
            if hmac.compare_digest(offered, known):
                owner = name
        return owner

    def add(self, name: str) -> str:
        """A new key; ``ValueError`` where the name is taken or no name."""
        self._refresh()
        if not _NAME.fullmatch(name):
            raise ValueError(f"name: must be 1 to 64 letters, digits or . _ @ -, got {name!r}")
        if name in self._hashes:
            raise ValueError(f"name: {name!r} has a key already; remove it first, or take another name")
        key = _PREFIX + secrets.token_urlsafe(32)
        self._write(self._hashes | {name: _hash(key)})
        return key

    def remove(self, name: str) -> None:
        """Makes a key worthless; ``ValueError`` where there is none of this name."""
        self._refresh()
        if name not in self._hashes:
            raise ValueError(f"name: nobody is called {name!r}; there are {', '.join(self.names()) or 'no keys'}")
        self._write({other: known for other, known in self._hashes.items() if other != name})

    def names(self) -> list[str]:
        self._refresh()
        return sorted(self._hashes)

    def _refresh(self) -> None:
        try:
            found = self._file.stat()
        except FileNotFoundError:
            self._stamp, self._hashes = None, {}
            return
        except OSError as error:
            raise KeysAway(f"the file of API keys cannot be read: {error.strerror}") from error
        self._is_closed = True
        stamp = (found.st_mtime_ns, found.st_ino)
        if stamp != self._stamp:
            try:
                hashes = json.loads(self._file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise KeysAway(f"the file of API keys cannot be read: {type(error).__name__}") from error
            if not isinstance(hashes, dict) or not all(isinstance(known, str) for known in hashes.values()):
                raise KeysAway("the file of API keys is damaged: not a JSON object of texts")
            self._stamp, self._hashes = stamp, hashes

    def _write(self, hashes: dict[str, str]) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._file.with_name(f".{secrets.token_hex(8)}.tmp")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(hashes, file, indent=1)
        os.replace(temporary, self._file)
        self._is_closed = True


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def main(words: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 for what cannot be."""
    parser = argparse.ArgumentParser(prog="python -m serve.keys", description="API keys of the service")
    parser.add_argument("action", choices=["add", "remove", "list"])
    parser.add_argument("name", nargs="?", default="")
    args = parser.parse_args(words)
    try:
        keys = Keys(Settings.from_environment().keys_file)
        match args.action:
            case "add":
                print(keys.add(args.name))
            case "remove":
                keys.remove(args.name)
            case "list":
                print("\n".join(keys.names()))
    except (KeysAway, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
