"""Compares samples with real images: all metrics, and the notes a reader needs to interpret them."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ddpm_jax.evaluation import metrics
from ddpm_jax.evaluation.features import Features
from ddpm_jax.evaluation.image_sets import ImageSet
from ddpm_jax.evaluation.references import halves_of
from ddpm_jax.evaluation.results import FLOOR, INTERVAL
from ddpm_jax.evaluation.summaries import Summary, summarize
from ddpm_jax.runtime.errors import UserError

_ENOUGH = 50_000  # number of images in reported FIDs
_KID_SUBSET, _SPLITS = 1000, 10
_FEWEST = 10  # images of each kind that all metrics but the distance itself need

Images = Summary | ImageSet | Iterable[np.ndarray]


def compare(
    features: Features,
    real: Images,
    fake: Images,
    mesh: Mesh,
    *,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Any]:
    """Computes all metrics of generated images against real ones.

    Args:
      features: the feature network.
      real, fake: summaries (`summarize`, `open_summary`); or images, uint8 [N, H, W, C] in any portions.
      mesh, batch_size: the devices for computing features of images, and the number of images at a time.
      seed: of random subsets, splits and resamplings.

    Returns:
      By name: what was compared ("features", "images", "reference", "generated", "num_real", "num_generated"); the
      metrics; for the Frechet distance also its 95 % bootstrap interval over other generated images of the same model,
      its floor, which is the distance that as many real images would have (`metrics.frechet_floor`), and its
      extrapolation to infinitely many generated images; "not computed", the metrics that the sets do not allow; and
      "note", sentences on how to interpret the numbers.

    Raises:
      UserError: fewer than 2 images, or summaries with other features.
    """
    theirs = _summary(features, real, mesh, batch_size)
    ours = _summary(features, fake, mesh, batch_size)
    _check(features, theirs, ours)
    result: dict[str, Any] = {
        "features": features.name,
        "images": "8-bit",
        "reference": describe(theirs.source),
        "generated": describe(ours.source),
        "num_real": theirs.count,
        "num_generated": ours.count,
    }
    result |= _distances(features, theirs, ours, seed) | _others(features, theirs, ours, seed)
    absent = [name for name in _wanted(features, ours) if name not in result]
    if absent:
        result["not computed"] = ", ".join(absent)
    note = " ".join(_notes(features, theirs, ours, result))
    return result | ({"note": note} if note else {})


def _summary(features: Features, images: Images, mesh: Mesh, batch_size: int) -> Summary:
    if isinstance(images, Summary):
        return images
    source = images.source if isinstance(images, ImageSet) else {}
    return summarize(features, images, mesh, batch_size=batch_size, source=source)


def _check(features: Features, real: Summary, fake: Summary) -> None:
    for summary in (real, fake):
        if summary.features not in ("", features.name):
            raise UserError(f"{describe(summary.source)} has features of {summary.features!r}, not {features.name!r}")
        if summary.count is not None and summary.count < 2:
            raise UserError(f"an evaluation needs at least 2 images of each kind, not {summary.count}")
    for name in real.moments.keys() & fake.moments.keys():
        dims = [len(summary.moments[name].mean) for summary in (real, fake)]
        if dims[0] != dims[1]:
            raise UserError(
                f"the reference {describe(real.source)} has {dims[0]} dimensions, but {features.name} has {dims[1]} "
                f"({name})"
            )


def _distances(features: Features, real: Summary, fake: Summary, seed: int) -> dict[str, Any]:
    reference, moments, name = real.moments["pool"], fake.moments["pool"], features.frechet
    root = metrics.covariance_root(reference)
    value = metrics.frechet_distance(moments, reference, root=root)
    result: dict[str, Any] = {name: value}
    rows = fake.rows.get("pool")
    if rows is not None and len(rows) >= _FEWEST:
        influence = metrics.frechet_influence(rows, moments, reference, root=root)
        result[name + INTERVAL] = list(metrics.bootstrap_interval(value, influence, seed=seed))
    floor = _floor(real, fake, seed)
    if floor is not None:
        result[name + FLOOR] = floor
    if rows is not None and len(rows) >= _FEWEST:
        result[_infinity(name)], result[f"{name}, bias"] = metrics.frechet_infinity(
            rows, reference, root=root, seed=seed
        )
    if "spatial" in real.moments and "spatial" in fake.moments:
        result["sFID"] = metrics.frechet_distance(fake.moments["spatial"], real.moments["spatial"])
    return result


def _infinity(name: str) -> str:
    return "FID-infinity" if name == "FID" else f"{name}, extrapolated"


def _floor(real: Summary, fake: Summary, seed: int) -> float | None:
    count, rows = fake.count, real.rows.get("pool")
    if count is None:
        return None
    if rows is not None and len(rows) >= _FEWEST:
        return metrics.frechet_floor(rows, count, seed=seed)
    halves = halves_of(real)
    if halves is None or real.count is None:
        return None
    parts = (real.count // 2, real.count - real.count // 2)
    return metrics.scaled_floor(halves, parts, count, real.count)


def _others(features: Features, real: Summary, fake: Summary, seed: int) -> dict[str, Any]:
    """The metrics that need the features of single images."""
    result: dict[str, Any] = {}
    rows, reference = fake.rows.get("pool"), real.rows.get("pool")
    if rows is not None and reference is not None and min(len(rows), len(reference)) >= _FEWEST:
        size = min(_KID_SUBSET, len(rows) // 2, len(reference) // 2)
        result["KID"], result["KID, deviation of subsets"] = metrics.kid(reference, rows, subset_size=size, seed=seed)
        result |= metrics.manifolds(reference, rows)._asdict()
    logits = fake.rows.get("logits")
    if logits is not None and len(logits) >= _SPLITS:
        score = _score(features)
        result[score], result[f"{score}, deviation of splits"] = metrics.inception_score(logits, _SPLITS)
    return result


def _score(features: Features) -> str:
    return "IS" if features.frechet == "FID" else f"Inception Score ({features.name})"


def _wanted(features: Features, fake: Summary) -> list[str]:
    spatial = ["sFID"] if "spatial" in fake.moments else []
    score = [_score(features)] if features.frechet == "FID" else []
    return [features.frechet + FLOOR, _infinity(features.frechet), *spatial, "KID", *metrics.Manifolds._fields, *score]


def _notes(features: Features, real: Summary, fake: Summary, result: Mapping[str, Any]) -> list[str]:
    notes, name = [], features.frechet
    count = fake.count
    if count is not None and count < _ENOUGH:
        bias = result.get(f"{name}, bias")
        much = "" if bias is None else f", here by about {bias:.2g}"
        notes.append(
            f"{name} is for {count:,} generated images; with fewer than {_ENOUGH:,} it is too high{much}, and only "
            "comparable with values for as many."
        )
    dims = len(fake.moments["pool"].mean)
    if min((n for n in (count, real.count) if n is not None), default=dims + 1) <= dims:
        notes.append(f"There are no more images than the features' {dims:,} dimensions, so {name} is mostly bias.")
    if "pool" not in real.rows:
        notes.append("The reference contains only moments, so metrics that need the real images are left out.")
    if not real.features or "moments" in real.source:
        notes.append("The reference file does not say which network or which resizing of images it was made with.")
    return notes


def describe(source: Mapping[str, Any]) -> str:
    """A summary's source in a few words; without a source, "images"."""
    if not source:
        return "images"
    kind = source.get("source", "images")
    what = source.get("path", source.get("name", ""))
    return " ".join(str(part) for part in (kind, what, source.get("split", "")) if part)
