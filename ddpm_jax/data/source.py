"""A source of images: a sequence of examples {"image": uint8 [H, W, C], "label": int}, all of the config's size.

It is cheap to open and decodes an image only on access, from any thread or worker process. If captions are requested,
the source's `captions` has them by image.
"""

from collections.abc import Sequence
from typing import Any, Protocol

Example = dict[str, Any]


class Source(Protocol):
    """A sequence of examples, with the description that a workdir records.

    Attributes:
      shape: (H, W, C) of every image.
      class_names: one per label; empty if the images have no classes.
      captions: one or more for each image; empty if none were requested.
    """

    shape: tuple[int, int, int]
    class_names: tuple[str, ...]

    @property
    def captions(self) -> Sequence[tuple[str, ...]]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def describe(self) -> dict[str, Any]:
        """A JSON-serialisable description with a fingerprint of the examples (of a folder: of file names and sizes)."""
        ...


def description(source: Source, kind: str, fingerprint: str, **details: Any) -> dict[str, Any]:
    return {
        "source": kind,
        **details,
        "num_images": len(source),
        "shape": list(source.shape),
        "class_names": list(source.class_names),
        "fingerprint": fingerprint,
    }
