"""Whether a model's files of weights are there and whole, as far as can be told without reading them; no torch.

A model has one file or, where it is large, shards and an index of them.
"""

import json
import zipfile
from pathlib import Path

_LFS_POINTER = b"version https://git-lfs"
_MOST_HEADER_BYTES = 100_000_000  # safetensors' own limit


def weights_files(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """All files that libraries may read for a variant, with the shards that an index names; none where there are none.

    ``ValueError`` naming the index where it is damaged or names a file elsewhere.
    """
    infix = f".{variant}" if variant else ""
    found: list[Path] = []
    for suffix in (".safetensors", ".bin"):
        single, index = folder / f"{stem}{infix}{suffix}", folder / f"{stem}{suffix}.index{infix}.json"
        if single.is_file():
            found.append(single)
        if index.is_file():
            found += [index, *(folder / name for name in _shards(index))]
    return found


def check_whole(path: Path) -> None:
    """``ValueError`` naming the file where it is missing, cut short, or only stands for one that was not fetched."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; the download may be incomplete")
    with open(path, "rb") as file:
        start = file.read(8)
        if start + file.read(len(_LFS_POINTER) - 8) == _LFS_POINTER:
            raise ValueError(f"{path} is a Git LFS pointer and not the file itself; fetch it with `git lfs pull`")
        if path.suffix == ".safetensors":
            file.seek(8)
            _check_safetensors(path, start, file.read(min(int.from_bytes(start, "little"), _MOST_HEADER_BYTES)))
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is cut short; the download may be incomplete")
    if not start:
        raise ValueError(f"{path} is empty; the download may be incomplete")


def file_stamps(folder: Path, pattern: str = "**/*") -> tuple[tuple[str, int, int], ...]:
    """Name, time and size of a folder's files: others where somebody changed them."""
    found = [(path, path.stat()) for path in sorted(folder.glob(pattern)) if path.is_file()]
    return tuple((str(path), stat.st_mtime_ns, stat.st_size) for path, stat in found)


def _check_safetensors(path: Path, length: bytes, header: bytes) -> None:
    """The format has the header's length, the header, and the tensors at the places that it says, to the last byte."""
    size = path.stat().st_size
    try:
        tensors = json.loads(header)
        ends = [int(entry["data_offsets"][1]) for name, entry in tensors.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        what = "is empty" if not size else "has no header of safetensors"
        raise ValueError(f"{path} {what}; the download may be incomplete") from error
    expected = 8 + int.from_bytes(length, "little") + max(ends, default=0)
    if size != expected:
        raise ValueError(f"{path} has {size} bytes instead of {expected}; the download may be incomplete")


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        are_plain = bool(names) and all(Path(name).name == name for name in names)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of shards ({error})") from error
    if not are_plain:
        raise ValueError(f"{index} names no shards beside it")
    return names
