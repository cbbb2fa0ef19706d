"""An in-memory cache of expensive results."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Cache(Generic[K, V]):
    """A least-recently-used cache, safe for threads.

    Args:
      most: how many results are kept between calls; at least one is.
    """

    def __init__(self, most: int):
        self._most = max(most, 1)
        self._kept: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def __call__(self, keys: Sequence[K], make: Callable[[list[K]], Iterable[V]]) -> list[V]:
        """The result for each of the keys; `make` computes those of all keys that are not cached, in order."""
        with self._lock:
            found = {key: self._kept[key] for key in keys if key in self._kept}
            missing = [key for key in dict.fromkeys(keys) if key not in found]
            if missing:
                found |= zip(missing, make(missing), strict=True)
            for key, value in found.items():
                self._kept[key] = value
                self._kept.move_to_end(key)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return [found[key] for key in keys]
