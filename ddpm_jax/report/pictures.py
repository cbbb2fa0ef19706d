"""The pictures of a run on its page."""

import base64
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddpm_jax.data.pictures import opened
from ddpm_jax.report.elements import figure, listed, text
from ddpm_jax.runtime import images
from ddpm_jax.runtime.errors import UserError, reason

_MOST_PICTURES = 24  # samples during training
_MOST_MADE = 12  # pictures from sampling and editing
_MOST_OPEN = 8  # prompts of a picture that are shown expanded
_OF_TRAINING = re.compile(r"(step_\d{8}|data|final|denoising)\.png")
_LARGE = 60_000  # bytes above which a picture is compressed lossily

Pictures = list[dict[str, str]]  # of a slider: [{"label", "alt", "src"}]


def pictures_on_the_way(folder: Path) -> Pictures:
    paths = sorted((folder / "samples").glob("step_????????.png"))
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(len(paths), _MOST_PICTURES)).round().astype(int))
    labels = {path: f"step {int(path.stem.removeprefix('step_')):,}" for path in paths}
    found = [(labels[paths[i]], paths[i]) for i in chosen]
    if (folder / "samples" / "final.png").exists():
        found.append(("the end, with all sampling steps", folder / "samples" / "final.png"))
    return [{"label": label, "alt": f"A grid of samples at {label}", "src": encoded(path)} for label, path in found]


def denoising_stages(folder: Path, dataset: Mapping[str, Any]) -> tuple[Pictures, int]:
    """Splits denoising.png, with one row per image and one column per stage, into one picture per stage; also returns
    the number of images."""
    path = folder / "samples" / "denoising.png"
    if not path.exists() or not dataset.get("shape"):
        return [], 0
    height, width, _ = dataset["shape"]
    gap, factor = 2, images.enlargement(height, width)
    rows, columns = height * factor + gap, width * factor + gap
    strip = np.asarray(_open(path))
    strip = strip[..., None] if strip.ndim == 2 else strip
    count = (strip.shape[1] - gap) // columns
    found = []
    for stage in range(count):
        column = strip[gap:, gap + stage * columns :][:, : columns - gap]
        pictures = column.reshape(-1, rows, *column.shape[1:])[:, : rows - gap]
        label = "noise" if stage == 0 else "image" if stage == count - 1 else f"stage {stage + 1} of {count}"
        shown = images.show(pictures, columns=-(-len(pictures) // 2), gap=gap)
        found.append({"label": label, "alt": f"Samples during denoising: {label}", "src": encoded(shown)})
    return found, (len(strip) - gap) // rows


def pictures_made(folder: Path) -> str:
    """The results of sampling and editing, newest first."""
    paths = [path for path in (folder / "samples").glob("*.png") if not _OF_TRAINING.fullmatch(path.name)]
    paths = sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)
    figures = [figure(encoded(path), f"Pictures, {path.stem}", path.name, _asked(path)) for path in paths[:_MOST_MADE]]
    if len(paths) > _MOST_MADE:
        figures.append(f"<p>and {len(paths) - _MOST_MADE} older ones in samples/</p>")
    return "".join(figures)


def _asked(path: Path) -> str:
    """A picture's settings according to its text chunks; see `Job.text`."""
    try:
        with opened(path) as image:
            description, settings = (str(image.info.get(name, "")) for name in ("Description", "settings"))
        told = json.loads(settings)
        if not isinstance(told, dict):
            return ""
        scale = float(told.get("guidance_scale", 1))
    except (ValueError, TypeError, OSError):  # there are none, or another program wrote them
        return ""
    wanted, unwanted = told.get("prompts"), told.get("negative_prompts")
    # With many prompts the settings only have a digest.
    prompts = wanted if isinstance(wanted, list) else description.splitlines()
    rows = ", one per row" if path.name.startswith("step_") and isinstance(wanted, list) else ""
    facts = [f"seed {told['seed']}"] if "seed" in told else []
    facts += [f"guidance {scale:g}"] if scale != 1 else []
    negative = f"negative prompt: {'; '.join(map(str, unwanted))}" if isinstance(unwanted, list) and unwanted else ""
    lines = [", ".join(facts), f"prompt: {prompts[0]}" if len(prompts) == 1 else "", negative]
    found = "".join(f"<br>{text(line)}" for line in lines if line)
    if len(prompts) > 1:
        is_open = " open" if len(prompts) <= _MOST_OPEN else ""
        found += f"<details{is_open}><summary>Prompts{rows}</summary>{listed(map(str, prompts))}</details>"
    return found


def slider(name: str, pictures: Pictures, caption: str, more: str) -> str:
    """A picture with a slider over all of them; without scripts it shows the last one. `more` as in `figure`."""
    if not pictures:
        return ""
    last = pictures[-1]
    control = (
        f'<p class="control"><label for="{name}-slider">Show</label>'
        f'<input type="range" id="{name}-slider" min="0" max="{len(pictures) - 1}" value="{len(pictures) - 1}" '
        f'data-pictures="{name}"><output for="{name}-slider">{text(last["label"])}</output></p>'
    )
    picture = f'<img id="{name}-picture" src="{last["src"]}" alt="{text(last["alt"])}">'
    shown = f"<figure>{picture}<figcaption>{text(caption)}{more}</figcaption></figure>"
    return (control if len(pictures) > 1 else "") + shown


def encoded(picture: Path | Image.Image) -> str:
    """A data URI; large pictures are compressed lossily, without visible loss."""
    if isinstance(picture, Path):
        raw = picture.read_bytes()
    else:
        buffer = io.BytesIO()
        picture.save(buffer, "png", optimize=True)
        raw = buffer.getvalue()
    kind = "png"
    if len(raw) > _LARGE:
        picture = _open(picture) if isinstance(picture, Path) else picture
        buffer, kind = io.BytesIO(), "webp"
        picture.convert("RGB").save(buffer, kind, quality=85)
        raw = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"


def _open(path: Path) -> Image.Image:
    try:
        with opened(path) as image:
            image.load()
            return image
    except (ValueError, OSError) as error:
        raise UserError(f"{str(path)!r} cannot be read as a picture: {reason(error)}") from None
