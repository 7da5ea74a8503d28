"""Named arrays and a little JSON to bytes and back, in the safetensors format: no pickle, so reading runs no code."""

import json
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import safetensors.numpy

_KEY = "raydream"  # safetensors' own metadata are strings; ours is one JSON document under this key


@runtime_checkable
class Shaped(Protocol):
    """An array or a tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def odd_names(here: Mapping[str, Shaped], there: Mapping[str, Shaped]) -> list[str]:
    """The names that only one side has or whose shapes differ, sorted."""
    shapes, others = ({name: tuple(each.shape) for name, each in some.items()} for some in (here, there))
    return sorted(name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name))


def pack(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> bytes:
    """One safetensors file. ``metadata`` is anything JSON; equal inputs give equal bytes."""
    plain = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    return safetensors.numpy.save(plain, {_KEY: json.dumps(metadata, sort_keys=True)})


def unpack(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays, writable, and the metadata; SafetensorError where ``data`` is no such file."""
    arrays = safetensors.numpy.load(data)  # first: it checks the header that the next line trusts
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return arrays, json.loads(header["__metadata__"][_KEY])
