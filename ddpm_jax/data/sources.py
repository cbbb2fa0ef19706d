"""Opens a source of images by its kind."""

from collections.abc import Sequence

from ddpm_jax.data.files import ArraySource, FolderSource
from ddpm_jax.data.numbers import NumbersSource
from ddpm_jax.data.pictures import Fit
from ddpm_jax.data.prepared import open_prepared, prepared_name
from ddpm_jax.data.source import Source
from ddpm_jax.runtime.errors import UserError

SOURCES = ("digits", "numbers", "tfds", "folder", "array")


def open_source(
    kind: str,
    *,
    name: str = "",
    split: str = "train",
    path: str = "",
    data_dir: str | None = None,
    height: int,
    width: int,
    channels: int,
    labels: bool = False,
    captions: bool = False,
    caption: str = "",
    num_digits: int = 2,
    held_out: Sequence[int] = (),
    skipped: Sequence[str] = (),
) -> Source:
    """Opens a source of images.

    Args:
      kind: "digits" or "numbers" (built-in), "tfds" (by `name`), "folder" or "array" (by `path`).
      name: of a tensorflow-datasets data set: "cifar10", "celeb_a_hq/256", "lsun/church_outdoor".
      split: of that data set, including slicing notation: "train[:1000]".
      path: of the folder, or of the .npz or .npy file.
      data_dir: where tensorflow-datasets keeps its files; None: its default.
      height, width, channels: of the returned images.
      labels: whether to return the images' classes.
      captions: whether to return the images' captions.
      caption: the name of the caption feature in a tensorflow-datasets data set.
      num_digits, held_out: for "numbers"; see `NumbersSource`.
      skipped: for a folder, the files to leave out.

    Raises:
      UserError: something is missing or unreadable; it is named.
    """
    if channels not in (1, 3):
        raise UserError(f"data.channels is {channels}; accepted: 1 (grey) or 3 (RGB)")
    fit = Fit(height, width, channels)
    if kind == "folder":
        return FolderSource(path, fit, labels, skipped, captions)
    if kind == "array":
        return ArraySource(path, fit, labels, captions)
    if kind == "numbers":
        if labels:
            raise UserError("data.source 'numbers' has captions but no classes; model.class_conditional must be False")
        return NumbersSource(num_digits, held_out, fit)
    if captions and not (kind == "tfds" and caption):
        what = "data.caption must name the text feature" if kind == "tfds" else "accepted: numbers, tfds, folder, array"
        raise UserError(f"data.source is {kind!r}, but the run needs captions; {what}")
    prepared = prepared_name(kind, name)
    if prepared:
        return open_prepared(prepared, split, data_dir, fit, labels, caption if captions else "")
    raise UserError(f"data.source is {kind!r}; accepted: {', '.join(SOURCES)}")
