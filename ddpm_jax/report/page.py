"""The page of a run, made only from the files in its workdir; page.html has its style and script."""

import base64
import datetime
import html
import io
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from ddpm_jax import config as config_lib
from ddpm_jax.data.pictures import opened
from ddpm_jax.evaluation import results
from ddpm_jax.evaluation.comparison import describe
from ddpm_jax.runtime import images, workdir
from ddpm_jax.runtime.errors import UserError, first_line, reason
from ddpm_jax.runtime.files import read_json, read_json_lines, write_text
from ddpm_jax.runtime.lock import hold
from ddpm_jax.training.journal import METRICS

REPORT = "report.html"
_MOST_POINTS = 600  # of a curve
_MOST_PICTURES = 24  # samples during training
_MOST_MADE = 12  # pictures from sampling and editing
_MOST_OPEN = 8  # prompts of a picture that are shown expanded
_OF_TRAINING = re.compile(r"(step_\d{8}|data|final|denoising)\.png")
_LARGE = 60_000  # bytes above which a picture is compressed lossily


def write(folder: str | Path) -> Path:
    """Writes report.html into a workdir, from the files there; the run may still be training.

    Raises:
      UserError: the folder is not a workdir.
    """
    folder = Path(folder).expanduser()
    workdir.read_config(folder)
    path = folder / REPORT
    with hold(folder / f".{REPORT}.lock", "writing", wait=True):  # else an older state could be written last
        write_text(path, _page(folder))
    return path


def update(folder: str | Path) -> None:
    """The same for code with other work to do: if the report cannot be written, it only logs a warning."""
    try:
        write(folder)
    except Exception as error:  # a full disk is reported by the code that depends on it
        logging.warning("%s could not be written: %s", REPORT, first_line(error))


def _page(folder: Path) -> str:
    config = workdir.read_config(folder)
    dataset = workdir.read_dataset(folder) or {}
    lines = read_json_lines(folder / METRICS)
    history = read_json_lines(folder / workdir.HISTORY)
    drawn = _pictures_on_the_way(folder)
    stages, in_strip = _stages(folder, dataset)
    runs = read_json(folder / workdir.STAGES, {}).get("stages", [])  # of a pipeline
    captions = [str(caption) for caption in dataset.get("shown_captions", [])]
    in_grids = max(config.log.sample_images, config.sample.num_images)
    environment = read_json(folder / workdir.ENVIRONMENT, {})
    sections = {
        "summary": _of_pipeline(runs) if runs else _summary(config, dataset, lines, history, environment),
        "data": _data(folder, dataset, _captions(captions)),
        "samples": _slider(
            "samples",
            drawn,
            _WHAT_IS_DRAWN.get("prior" if config.prior.clip else config.train.objective, _SAMPLES),
            _captions(captions, in_grids),
        ),
        "denoising": _slider(
            "denoising", stages, "The same images at successive steps from noise, x_t.", _captions(captions, in_strip)
        ),
        "pictures": _pictures(folder),
        "curves": _curves(lines),
        "evaluation": _evaluations(folder),
        "history": _history(history, config.train.num_steps, lines, folder),
        "config": "" if runs else _config(config),
    }
    sections = {name: body for name, body in sections.items() if body}
    page = resources.files(__package__).joinpath("page.html").read_text()
    values = {
        "title": html.escape(folder.resolve().name),
        "state": html.escape(
            f"a pipeline of {len(runs)} runs" if runs else _state(history, lines, config.train.num_steps)
        ),
        "written": datetime.datetime.now().astimezone().isoformat(" ", "minutes"),
        "data": _script({"curves": _thinned(lines), "samples": drawn, "denoising": stages}),
        "sections": "\n".join(
            f'<section id="{name}"><h2>{_TITLES[name]}</h2>\n{body}\n</section>'
            for name, body in sections.items()
            if body
        ),
        "links": "".join(f'<a href="#{name}">{_TITLES[name]}</a>' for name, body in sections.items() if body),
    }
    for name, value in values.items():
        page = page.replace(f"<!--{name}-->", value)
    return page


_TITLES = {
    "summary": "Summary",
    "data": "Data",
    "samples": "Samples over time",
    "denoising": "From noise to image",
    "pictures": "Pictures from this run",
    "curves": "Curves",
    "evaluation": "Evaluation",
    "history": "History",
    "config": "Config",
}


# Of the pictures that training makes, by objective.
_SAMPLES = "All start from the same noise, so the pictures can be compared."
_WHAT_IS_DRAWN = {
    "autoencoder": "Training pictures, each followed by its reconstruction.",
    "clip": "Training pictures above the captions that the CLIP picks for them, in red if wrong.",
    "prior": "The training pictures whose embeddings are nearest to those that are drawn for the captions.",
}


def _state(history: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]], num_steps: int) -> str:
    step = max((line["step"] for line in lines), default=0)
    event = history[-1]["event"] if history else "started"
    words = "in training, or interrupted" if event == "started" else event
    return ("" if step >= num_steps else f"{words}: ") + f"step {step:,} of {num_steps:,}"


def _summary(
    config: Any,
    dataset: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    history: Sequence[Mapping[str, Any]],
    environment: Mapping[str, Any],
) -> str:
    diffusion, train = config.diffusion, config.train
    started: Mapping[str, Any] = next((event for event in reversed(history) if event["event"] == "started"), {})
    speeds = [line["images_per_second"] for line in lines if "images_per_second" in line]
    facts: dict[str, Any] = {}
    if dataset.get("shape"):
        classes = f", {len(dataset['class_names'])} classes" if dataset.get("class_names") else ""
        held_out = f", {len(dataset['held_out'])} numbers held out" if dataset.get("held_out") else ""
        found = f"{dataset.get('num_images', 0):,} images of {_size(dataset)}"
        facts["Data"] = f"{describe(dataset)}: {found}{classes}{held_out}"
    size = f"{started['num_parameters']:,} parameters, " if "num_parameters" in started else ""
    facts["Network"] = f"{_network(config, size)}, {config.model.dtype}"
    if config.text.encoder == config_lib.TRAINED:
        facts["Text encoder"] = f"trained, width {config.text.width}, {config.text.num_layers} layers"
    elif config.text.encoder:
        facts["Text encoder"] = f"frozen, {config.text.encoder}"
    if train.objective == "diffusion":
        facts["Diffusion"] = (
            f"{diffusion.schedule} schedule of {diffusion.num_timesteps:,} timesteps, predicts {diffusion.prediction}, "
            f"variance {diffusion.variance}"
        )
    facts["Training"] = (
        f"{train.num_steps:,} steps of {train.batch_size} images, {config.optimizer.name} at "
        f"{config.optimizer.learning_rate:g}, average of decay {train.ema_decays[0]:g}"
    )
    if lines:
        last = lines[-1]
        losses = [line for line in lines if "loss" in line]  # evaluations have none
        if losses:
            facts["Loss"] = f"{losses[-1]['loss']:.4f} at step {losses[-1]['step']:,}"
        if speeds:
            middle = statistics.median(speeds)
            facts["Speed"] = f"{middle:,.0f} images/s, {middle / train.batch_size:.3g} steps/s (median)"
        memory = [line["peak_memory_gib"] for line in lines if "peak_memory_gib" in line]
        if memory:
            facts["Memory"] = f"{max(memory):.2f} GiB at the peak, on the first device or, on CPU, of the process"
        facts["Last update"] = _time(last["time"])
    facts["Devices"] = started.get("devices") or environment.get("devices", "")
    packages = environment.get("packages", {})
    facts["Versions"] = ", ".join(f"{name} {version}" for name, version in packages.items())
    facts["Source"] = environment.get("git_revision") or ""
    return _facts({name: value for name, value in facts.items() if value})


def _network(config: Any, size: str) -> str:
    """What the run trains; `size` is its number of parameters, in words."""
    if config.train.objective == "autoencoder":
        autoencoder = config.autoencoder
        return (
            f"Autoencoder of {size}{_listed(autoencoder.level_channels)} channels by level, "
            f"{_blocks(autoencoder.num_res_blocks)}, {autoencoder.latent_channels} channels of latents"
        )
    if config.train.objective == "clip":
        clip = config.clip
        return (
            f"CLIP of {size}image encoder of width {clip.width} and {clip.num_layers} layers on patches of "
            f"{clip.patch_size}x{clip.patch_size}, embeddings of width {clip.projection}"
        )
    if config.prior.clip:
        return f"Transformer of {size}width {config.prior.width}, {config.prior.num_layers} layers"
    model = config.model
    widths = model.level_channels or [model.channels * multiplier for multiplier in model.channel_multipliers]
    blocks = f"{' '.join(map(str, model.level_res_blocks))} blocks" if model.level_res_blocks else ""
    return f"UNet of {size}{_listed(widths)} channels by level, {blocks or _blocks(model.num_res_blocks)}"


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _blocks(count: int) -> str:
    return f"{count} block{'s' if count > 1 else ''} each"


def _of_pipeline(runs: Sequence[Mapping[str, Any]]) -> str:
    """The stages of a pipeline, each of which has its own report."""
    names = [f"{run['workdir']}, step {run['step']:,}, makes {'x'.join(map(str, run['size']))}" for run in runs]
    return _facts({f"Stage {number}": name for number, name in enumerate(names, 1)})


def _facts(facts: Mapping[str, Any]) -> str:
    return "<dl>" + "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items()) + "</dl>"


def _data(folder: Path, dataset: Mapping[str, Any], captions: str) -> str:
    path = folder / "samples" / "data.png"
    if not path.exists():
        return ""
    alt = f"A grid of training images, {_size(dataset)} each"
    return _figure(_encoded(path), alt, "Training images.", captions)


def _figure(source: str, alt: str, caption: str, more: str = "") -> str:
    """`more` is HTML that follows the caption."""
    return f'<figure><img src="{source}" alt="{_text(alt)}"><figcaption>{_text(caption)}{more}</figcaption></figure>'


def _captions(captions: Sequence[str], count: int | None = None) -> str:
    """The captions of a grid's images, which repeat if there are more images."""
    if not captions:
        return ""
    count = len(captions) if count is None else count
    again = f"; after {len(captions)} they start again" if count > len(captions) else ""
    return f"<details><summary>Captions, row by row{again}</summary>{_list(captions[:count])}</details>"


def _list(texts: Iterable[str]) -> str:
    return f'<ol class="texts">{"".join(f"<li>{_text(text)}</li>" for text in texts)}</ol>'


# The pictures of a slider: [{"label", "alt", "src"}].

Pictures = list[dict[str, str]]


def _pictures_on_the_way(folder: Path) -> Pictures:
    paths = sorted((folder / "samples").glob("step_????????.png"))
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(len(paths), _MOST_PICTURES)).round().astype(int))
    labels = {path: f"step {int(path.stem.removeprefix('step_')):,}" for path in paths}
    found = [(labels[paths[i]], paths[i]) for i in chosen]
    if (folder / "samples" / "final.png").exists():
        found.append(("the end, with all sampling steps", folder / "samples" / "final.png"))
    return [{"label": label, "alt": f"A grid of samples at {label}", "src": _encoded(path)} for label, path in found]


def _stages(folder: Path, dataset: Mapping[str, Any]) -> tuple[Pictures, int]:
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
        found.append({"label": label, "alt": f"Samples during denoising: {label}", "src": _encoded(shown)})
    return found, (len(strip) - gap) // rows


def _pictures(folder: Path) -> str:
    """The results of sampling and editing, newest first."""
    paths = [path for path in (folder / "samples").glob("*.png") if not _OF_TRAINING.fullmatch(path.name)]
    paths = sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)
    figures = [
        _figure(_encoded(path), f"Pictures, {path.stem}", path.name, _asked(path)) for path in paths[:_MOST_MADE]
    ]
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
    found = "".join(f"<br>{_text(line)}" for line in lines if line)
    if len(prompts) > 1:
        is_open = " open" if len(prompts) <= _MOST_OPEN else ""
        found += f"<details{is_open}><summary>Prompts{rows}</summary>{_list(map(str, prompts))}</details>"
    return found


def _slider(name: str, pictures: Pictures, caption: str, more: str) -> str:
    """A picture with a slider over all of them; without scripts it shows the last one. `more` as in `_figure`."""
    if not pictures:
        return ""
    last = pictures[-1]
    slider = (
        f'<p class="control"><label for="{name}-slider">Show</label>'
        f'<input type="range" id="{name}-slider" min="0" max="{len(pictures) - 1}" value="{len(pictures) - 1}" '
        f'data-pictures="{name}"><output for="{name}-slider">{_text(last["label"])}</output></p>'
    )
    picture = f'<img id="{name}-picture" src="{last["src"]}" alt="{_text(last["alt"])}">'
    figure = f"<figure>{picture}<figcaption>{_text(caption)}{more}</figcaption></figure>"
    return (slider if len(pictures) > 1 else "") + figure


def _encoded(picture: Path | Image.Image) -> str:
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


# Curves.


def _curves(lines: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for line in lines for name in line if name not in ("step", "time")))
    if not names:
        return ""
    quarters = [name for name in names if name.startswith("loss_t_quarter_")]
    charts = []
    if "loss" in names:
        charts.append(_chart("loss", "Loss", ["loss"]))
    if quarters:
        charts.append(_chart("by-t", "Loss by t, in quarters of the timesteps", quarters))
    others = [name for name in names if name != "loss" and name not in quarters and not name.endswith("_error")]
    options = "".join(f"<option>{_text(name)}</option>" for name in others)
    choice = f'<label>of <select id="other-name">{options}</select></label>'
    charts.append(_chart("other", "Another number,", others[:1], choice))
    controls = (
        '<p class="control"><label><input type="checkbox" id="log" checked> logarithmic</label>'
        '<label>smoothing <input type="range" id="smoothing" min="0" max="0.98" step="0.02" value="0.6"></label></p>'
        "<noscript><p>The curves need JavaScript; metrics.jsonl has the numbers.</p></noscript>"
    )
    return controls + "".join(charts) + (_last_by_t(lines, quarters) if quarters else "")


def _chart(name: str, title: str, series: Sequence[str], control: str = "") -> str:
    wanted = _text(json.dumps(list(series)))
    return (
        f'<figure class="chart"><figcaption>{_text(title)} {control}</figcaption>'
        f'<svg id="chart-{name}" role="img" data-series="{wanted}"></svg>'
        f'<p class="legend"></p></figure>'
    )


def _last_by_t(lines: Sequence[Mapping[str, Any]], quarters: Sequence[str]) -> str:
    last = next(line for line in reversed(lines) if any(name in line for name in quarters))
    rows = [(f"quarter {name[-1]} of the timesteps", _number(last[name])) for name in quarters if name in last]
    return _table(["Last loss by t", f"step {last['step']:,}"], rows)


def _thinned(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """{name: [[step, value]]}; in long runs, neighbouring values are averaged."""
    curves: dict[str, list[list[float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in ("step", "time") and math.isfinite(value):
                curves.setdefault(name, []).append([line["step"], value])
    for name, points in curves.items():
        parts = np.array_split(np.array(points, np.float64), min(len(points), _MOST_POINTS))
        curves[name] = [[round(float(step)), float(f"{value:.6g}")] for step, value in (part.mean(0) for part in parts)]
    return curves


# Tables.


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    heads = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{_text(first)}</th>' + "".join(f"<td>{_text(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _evaluations(folder: Path) -> str:
    """The evaluations, one per column, newest first."""
    found = list(reversed(read_json(folder / results.RESULTS, [])))
    if not found:
        return ""
    names = dict.fromkeys(name for entry in found for name in entry.get("metrics") or results.metric_names(entry))
    settings = ("step", "sampler", "num_steps", "seed", "num_generated", "num_real", "reference", "features")
    rows = [[name, *(results.with_spread(entry, name) for entry in found)] for name in names]
    rows += [[name, *(entry.get(name, "") for entry in found)] for name in settings]
    body = _table(["", *(entry["time"][:16].replace("T", " ") for entry in found)], rows)
    notes = dict.fromkeys(entry["note"] for entry in found if "note" in entry)
    body += "".join(f"<p>{_text(note)}</p>" for note in notes)
    for name, what in (("terms", "the terms of the bound by t"), ("rate_distortion", "distortion by rate")):
        path = folder / f"evaluation_{name}.png"
        if path.exists():
            body += _figure(_encoded(path), f"A plot of {what}", f"Variational bound: {what}.")
    return body


def _history(
    history: Sequence[Mapping[str, Any]], num_steps: int, lines: Sequence[Mapping[str, Any]], folder: Path
) -> str:
    """The run's starts and ends, including interruptions."""
    items: list[str] = []
    is_running = False
    for event in history:
        step, time = event["step"], _time(event["time"])
        if event["event"] == "started":
            if is_running:
                items.append(f"interrupted after step {event['reached']:,}, for an unknown reason")
            way = "started" if not step else f"resumed from the checkpoint of step {step:,}"
            items.append(f"{time}: {way} on {event['devices']}")
        elif event["event"] == "failed":
            items.append(f"{time}: failed: {event['why']}; the checkpoint of step {step:,} is kept")
        else:
            items.append(f"{time}: {event['event']} at step {step:,} of {num_steps:,}, saved")
        is_running = event["event"] == "started"
    if is_running and lines:
        items.append(f"{_time(lines[-1]['time'])}: step {lines[-1]['step']:,}, the last one logged")
    aside = sorted(path.name for path in (folder / "corrupt").glob("*"))
    if aside:
        items.append(f"unreadable checkpoints, moved to corrupt/: step {', '.join(aside)}")
    return "<ol>" + "".join(f"<li>{_text(item)}</li>" for item in items) + "</ol>" if items else ""


def _config(config: Any) -> str:
    default = dict(config_lib.fields(config_lib.default_config()))
    found = dict(config_lib.fields(config))
    changed = [(name, value, default.get(name)) for name, value in found.items() if value != default.get(name)]
    rest = [(name, value) for name, value in found.items() if value == default.get(name)]
    other = _table(["field", "here", "CIFAR-10's"], changed) if changed else "<p>The paper's for CIFAR-10.</p>"
    return (
        other
        + f"<details><summary>{len(rest)} fields have the paper's value for CIFAR-10</summary>"
        + _table(["field", "value"], rest)
        + "</details>"
    )


# Text.


def _text(value: Any) -> str:
    return html.escape(str(value))


def _script(value: Any) -> str:
    """JSON that cannot close the surrounding script tag."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _number(value: float) -> str:
    return f"{value:.4g}"


def _size(dataset: Mapping[str, Any]) -> str:
    return "x".join(map(str, dataset.get("shape", ())))


def _time(time: float | str) -> str:
    """Formats a time in seconds since 1970 or in ISO format."""
    if isinstance(time, str):
        moment = datetime.datetime.fromisoformat(time)
    else:
        moment = datetime.datetime.fromtimestamp(time, datetime.UTC)
    return f"{moment:%Y-%m-%d %H:%M} UTC"
