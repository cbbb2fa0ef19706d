"""Curves of the variational bound as PNG files."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.evaluation.likelihood import Bound
from ddpm_jax.runtime.files import atomic_path

_BLUE, _ORANGE, _GREY = "#2a6f97", "#d1600b", "#555555"


def save_terms(path: str | os.PathLike, bound: Bound, title: str = "") -> Path:
    """Plots each term of the bound over t, with a band of two standard errors, and the sum of the terms from T to t."""
    figure, (axes,) = _figure((7, 4.2), 1)
    terms, error = bound.terms.mean, np.nan_to_num(bound.terms.standard_error)
    steps = np.arange(len(terms)) + 1
    # Half of the bound may be in the first few t, so the axes are logarithmic: a term of 0 leaves a gap, and a band
    # that reaches 0 is cut off a decade below the term.
    positive = np.where(terms > 0, terms, np.nan)
    low = np.fmax(positive - 2 * error, positive / 10)
    axes.fill_between(steps[1:], low[1:], (positive + 2 * error)[1:], color=_BLUE, alpha=0.2, linewidth=0)
    axes.plot(steps[1:], positive[1:], color=_BLUE, linewidth=1.3)
    axes.plot(steps[:1], positive[:1], "o", color=_BLUE, markersize=5, clip_on=False)
    axes.annotate(f"$L_0$ = {terms[0]:.3g}", (1, terms[0]), (8, 0), textcoords="offset points", va="center")
    axes.set(xscale="log", yscale="log", xlabel="noising steps, $t + 1$")
    axes.set_ylabel("term of the bound, bits/dim", color=_BLUE)

    sums = axes.twinx()
    sums.plot(steps, bound.rate + terms, color=_ORANGE, linewidth=1.3)
    sums.set_ylabel("sum of the terms from $T$ down to $t$, bits/dim", color=_ORANGE)
    sums.set_ylim(bottom=0)
    sums.spines["top"].set_visible(False)
    axes.set_title(title or _summary(bound), loc="left", fontsize=11)
    return _save(figure, path)


def save_rate_distortion(path: str | os.PathLike, bound: Bound, title: str = "") -> Path:
    """Plots distortion and rate over the reverse steps, and distortion over rate (DDPM, figure 5)."""
    figure, (left, middle, right) = _figure((11, 3.6), 3)
    rate, distortion = bound.rate, bound.distortion
    steps = len(rate) - 1 - np.arange(len(rate))
    for axes, values, label in ((left, distortion, "distortion, RMSE on 0..255"), (middle, rate, "rate, bits/dim")):
        axes.plot(steps, values, color=_BLUE, linewidth=1.5)
        axes.set(xlabel="reverse steps done, $T - 1 - t$", ylabel=label)
    right.plot(rate, distortion, color=_BLUE, linewidth=1.5)
    right.plot(rate[:1], distortion[:1], "o", color=_BLUE, markersize=5, clip_on=False)
    right.annotate(
        f"{rate[0]:.3g} bits/dim,\nRMSE {distortion[0]:.2g}",
        (rate[0], distortion[0]),
        (0, 10),
        textcoords="offset points",
        ha="right",
        color=_GREY,
    )
    right.set(xlabel="rate, bits/dim", ylabel="distortion, RMSE on 0..255")
    for axes in (left, middle, right):
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
    figure.suptitle(title or _summary(bound), x=0.01, ha="left", fontsize=11)
    return _save(figure, path)


def _figure(size: tuple[float, float], columns: int) -> tuple[Any, list[Any]]:
    """A figure and its axes, independent of pyplot's state."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=size, layout="constrained")
    row: list[Any] = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in row:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    return figure, row


def _summary(bound: Bound) -> str:
    total, error = float(bound.total.mean), float(bound.total.standard_error)
    error_text = f" ± {error:.2g}" if np.isfinite(error) else ""
    return f"bound {total:.4g}{error_text} bits/dim, {bound.num_images:,} images"


def _save(figure: Any, path: str | os.PathLike) -> Path:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return Path(path)
