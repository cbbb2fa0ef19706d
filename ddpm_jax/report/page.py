"""The page of a run, made only from the files in its workdir; page.html has its style and script."""

import datetime
import html
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from absl import logging

from ddpm_jax import config as config_lib
from ddpm_jax.evaluation import results
from ddpm_jax.report.curves import curves, thinned
from ddpm_jax.report.elements import figure, grid_captions, moment, script, size_of, table, text
from ddpm_jax.report.pictures import denoising_stages, encoded, pictures_made, pictures_on_the_way, slider
from ddpm_jax.report.summary import of_pipeline, summary
from ddpm_jax.runtime import workdir
from ddpm_jax.runtime.errors import first_line
from ddpm_jax.runtime.files import read_json, read_json_lines, write_text
from ddpm_jax.runtime.lock import hold
from ddpm_jax.training.journal import METRICS

REPORT = "report.html"


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
    drawn = pictures_on_the_way(folder)
    denoising, in_strip = denoising_stages(folder, dataset)
    runs = read_json(folder / workdir.STAGES, {}).get("stages", [])  # of a pipeline
    captions = [str(caption) for caption in dataset.get("shown_captions", [])]
    in_grids = max(config.log.sample_images, config.sample.num_images)
    environment = read_json(folder / workdir.ENVIRONMENT, {})
    sections = {
        "summary": of_pipeline(runs) if runs else summary(config, dataset, lines, history, environment),
        "data": _data(folder, dataset, grid_captions(captions)),
        "samples": slider(
            "samples",
            drawn,
            _WHAT_IS_DRAWN.get("prior" if config.prior.clip else config.train.objective, _SAMPLES),
            grid_captions(captions, in_grids),
        ),
        "denoising": slider(
            "denoising",
            denoising,
            "The same images at successive steps from noise, x_t.",
            grid_captions(captions, in_strip),
        ),
        "pictures": pictures_made(folder),
        "curves": curves(lines),
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
        "data": script({"curves": thinned(lines), "samples": drawn, "denoising": denoising}),
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


def _data(folder: Path, dataset: Mapping[str, Any], captions: str) -> str:
    path = folder / "samples" / "data.png"
    if not path.exists():
        return ""
    alt = f"A grid of training images, {size_of(dataset)} each"
    return figure(encoded(path), alt, "Training images.", captions)


def _evaluations(folder: Path) -> str:
    """The evaluations, one per column, newest first."""
    found = list(reversed(read_json(folder / results.RESULTS, [])))
    if not found:
        return ""
    names = dict.fromkeys(name for entry in found for name in entry.get("metrics") or results.metric_names(entry))
    settings = ("step", "sampler", "num_steps", "seed", "num_generated", "num_real", "reference", "features")
    rows = [[name, *(results.with_spread(entry, name) for entry in found)] for name in names]
    rows += [[name, *(entry.get(name, "") for entry in found)] for name in settings]
    body = table(["", *(entry["time"][:16].replace("T", " ") for entry in found)], rows)
    notes = dict.fromkeys(entry["note"] for entry in found if "note" in entry)
    body += "".join(f"<p>{text(note)}</p>" for note in notes)
    for name, what in (("terms", "the terms of the bound by t"), ("rate_distortion", "distortion by rate")):
        path = folder / f"evaluation_{name}.png"
        if path.exists():
            body += figure(encoded(path), f"A plot of {what}", f"Variational bound: {what}.")
    return body


def _history(
    history: Sequence[Mapping[str, Any]], num_steps: int, lines: Sequence[Mapping[str, Any]], folder: Path
) -> str:
    """The run's starts and ends, including interruptions."""
    items: list[str] = []
    is_running = False
    for event in history:
        step, time = event["step"], moment(event["time"])
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
        items.append(f"{moment(lines[-1]['time'])}: step {lines[-1]['step']:,}, the last one logged")
    aside = sorted(path.name for path in (folder / "corrupt").glob("*"))
    if aside:
        items.append(f"unreadable checkpoints, moved to corrupt/: step {', '.join(aside)}")
    return "<ol>" + "".join(f"<li>{text(item)}</li>" for item in items) + "</ol>" if items else ""


def _config(config: Any) -> str:
    default = dict(config_lib.fields(config_lib.default_config()))
    found = dict(config_lib.fields(config))
    changed = [(name, value, default.get(name)) for name, value in found.items() if value != default.get(name)]
    rest = [(name, value) for name, value in found.items() if value == default.get(name)]
    other = table(["field", "here", "CIFAR-10's"], changed) if changed else "<p>The paper's for CIFAR-10.</p>"
    return (
        other
        + f"<details><summary>{len(rest)} fields have the paper's value for CIFAR-10</summary>"
        + table(["field", "value"], rest)
        + "</details>"
    )
