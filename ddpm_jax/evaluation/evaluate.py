"""Samples judged against real images: features of both, all metrics, and what a reader must know beside the numbers."""

import datetime
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from ddpm_jax.errors import UserError
from ddpm_jax.evaluation import metrics
from ddpm_jax.evaluation.features import Features
from ddpm_jax.evaluation.metrics import Moments
from ddpm_jax.files import write_text

RESULTS, TABLE = "evaluation.json", "evaluation.md"
_ENOUGH = 50_000  # images that FID is reported with
_KID_SUBSET, _SPLITS = 1000, 10


def compare(
    features: Features,
    real: Iterable[np.ndarray],
    fake: Iterable[np.ndarray],
    mesh: Mesh,
    *,
    batch_size: int = 64,
    bootstrap: int = 20,
    seed: int = 0,
) -> dict[str, Any]:
    """Every metric of generated images against real ones.

    Args:
      features: what judges.
      real, fake: uint8 [N, H, W, C] in any portions.
      mesh, batch_size: where features are computed, and how many images at a time.
      bootstrap: resamplings of the generated images for the interval of the Frechet distance; 0: none.
      seed: of KID's subsets and of the resampling.

    Returns:
      Numbers by name; what a small set does not allow is left out.
    """
    ours, theirs = features.of(fake, mesh, batch_size), features.of(real, mesh, batch_size)
    result: dict[str, Any] = {
        "features": features.name,
        "num_real": len(theirs["pool"]),
        "num_generated": len(ours["pool"]),
    }
    least = min(result["num_real"], result["num_generated"])
    if least < 2:
        raise UserError(f"an evaluation needs 2 images or more of each kind, not {least}")
    rng = np.random.default_rng(seed)
    reference = Moments.of(theirs["pool"])
    result[features.frechet] = metrics.frechet_distance(Moments.of(ours["pool"]), reference)
    if bootstrap:
        again = [
            metrics.frechet_distance(
                Moments.of(ours["pool"][rng.integers(0, len(ours["pool"]), len(ours["pool"]))]), reference
            )
            for _ in range(bootstrap)
        ]
        result[f"{features.frechet}, standard error"] = float(np.std(again, ddof=1))
    if "spatial" in ours:
        spatial = (Moments.of(part["spatial"]) for part in (ours, theirs))
        result["sFID"] = metrics.frechet_distance(*spatial)
    result["KID"], result["KID, deviation of subsets"] = metrics.kid(
        theirs["pool"], ours["pool"], subset_size=min(_KID_SUBSET, least), seed=seed
    )
    if result["num_generated"] >= _SPLITS:
        score = "IS" if features.frechet == "FID" else f"Inception Score ({features.name})"
        result[score], result[f"{score}, deviation of splits"] = metrics.inception_score(ours["logits"], _SPLITS)
    if least > 5:
        result["precision"], result["recall"] = metrics.precision_recall(theirs["pool"], ours["pool"])
        result["density"], result["coverage"] = metrics.density_coverage(theirs["pool"], ours["pool"])
    if least < _ENOUGH:
        result["note"] = (
            f"of {least:,} images: a Frechet distance of fewer than {_ENOUGH:,} is too high by about "
            f"{frechet_bias(ours['pool'], reference, rng):.2g}, which falls as 1 / N"
        )
    return result


def frechet_bias(features: np.ndarray, reference: Moments, rng: np.random.Generator) -> float:
    """What the Frechet distance of N images is too high by: the slope over 1 / N, times 1 / N.

    From the distances of halves and of the whole, as FID-infinity extrapolates (Chong & Forsyth 2020).
    """
    whole = metrics.frechet_distance(Moments.of(features), reference)
    halves = []
    for _ in range(4):
        order = rng.permutation(len(features))
        halves += [metrics.frechet_distance(Moments.of(features[part]), reference) for part in np.array_split(order, 2)]
    return float(np.mean(halves) - whole)


def record(folder: Path, result: Mapping[str, Any]) -> None:
    """Adds a result to evaluation.json, which keeps all, and writes the table of all to evaluation.md."""
    path = folder / RESULTS
    try:
        history = json.loads(path.read_text()) if path.exists() else []
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    history.append({"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **result})
    write_text(path, json.dumps(history, indent=2) + "\n")
    write_text(folder / TABLE, _table(history))


def _table(history: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for entry in history for name in entry if name != "note"))
    lines = ["# Evaluations", "", f"| {' | '.join(columns)} |", f"|{'-|' * len(columns)}"]
    for entry in history:
        values = (entry.get(name, "") for name in columns)
        cells = (f"{value:.5g}" if isinstance(value, float) else str(value) for value in values)
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"- {entry['time']}: {entry['note']}" for entry in history if "note" in entry]
    return "\n".join([*lines, "", *notes, ""])
