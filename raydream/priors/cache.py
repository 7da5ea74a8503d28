"""What is frozen stays loaded in the process: setting up the next run with the same prior reads no weights again."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

Part = TypeVar("Part")


class PartCache:
    """Frozen parts by all that they depend on. What went unused the longest goes before another one is loaded."""

    def __init__(self, num_places: int) -> None:
        self._num_places = num_places
        self._parts: OrderedDict[Hashable, object] = OrderedDict()
        self._lock = threading.RLock()

    def get(self, key: Hashable, load: Callable[[], Part]) -> Part:
        """The part of ``key``, loaded where it is not here; whoever gets it must not change it."""
        with self._lock:
            if key not in self._parts:
                while len(self._parts) >= self._num_places:
                    self._parts.popitem(last=False)
                self._parts[key] = load()
            self._parts.move_to_end(key)
            return self._parts[key]  # type: ignore[return-value]  # a key is only ever used with one kind of part


# Big models one of a kind: most processes only ever see one, and two may not fit. Modes and texts are small.
DENOISERS, LEARNERS, AGPS, CODECS = (PartCache(1) for _ in range(4))
TEXTS, MODES = PartCache(16), PartCache(4)
