"""Curves of the variational bound as PNG files."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.evaluation.likelihood import Bound
from ddpm_jax.files import atomic_path

_BLUE, _ORANGE, _GREY = "#2a6f97", "#d1600b", "#555555"
_DISPLAY = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "axes.titlesize": 11}


def save_terms(path: str | os.PathLike, bound: Bound, title: str = "") -> Path:
    """Draws each term of the bound over t, with two standard errors around it, and its running sum from T down."""
    # Only those who plot wait for matplotlib; a Figure of its own touches no state of pyplot.
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_DISPLAY):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes: Any = figure.subplots()
        terms, error = bound.terms.mean, bound.terms.standard_error
        t = np.arange(len(terms))
        # Below 0 rounding alone is left, and 0 has no logarithm.
        low = np.maximum(terms - 2 * np.nan_to_num(error), terms / 10)
        axes.fill_between(t[1:], low[1:], (terms + 2 * np.nan_to_num(error))[1:], color=_BLUE, alpha=0.2, linewidth=0)
        axes.plot(t[1:], terms[1:], color=_BLUE, linewidth=1.3)
        axes.plot(t[:1], terms[:1], "o", color=_BLUE, markersize=5, clip_on=False)
        axes.annotate(f"$L_0$ = {terms[0]:.3g}", (t[0], terms[0]), (8, 0), textcoords="offset points", va="center")
        axes.set(yscale="log", xlabel="timestep $t$", xlim=(-0.01 * len(t), len(t) - 1))
        axes.set_ylabel("term of the bound, bits/dim", color=_BLUE)
        axes.grid(alpha=0.25, linewidth=0.6)

        sums: Any = axes.twinx()
        sums.plot(t, bound.rate + terms, color=_ORANGE, linewidth=1.3)
        sums.set_ylabel("sum of the terms at $t$ and above, bits/dim", color=_ORANGE)
        sums.set_ylim(bottom=0)
        sums.spines["right"].set_visible(True)
        axes.set_title(title or _summary(bound), loc="left")
        return _save(figure, path)


def save_rate_distortion(path: str | os.PathLike, bound: Bound, title: str = "") -> Path:
    """Draws the distortion over the rate (DDPM, figure 5, right), and both over t (left and middle)."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_DISPLAY):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        rate, distortion = bound.rate, bound.distortion
        reverse = len(rate) - 1 - np.arange(len(rate))
        left.plot(reverse, distortion, color=_BLUE)
        left.set(xlabel="reverse steps done, $T - 1 - t$", ylabel="distortion, RMSE on 0..255")
        middle.plot(reverse, rate, color=_BLUE)
        middle.set(xlabel="reverse steps done, $T - 1 - t$", ylabel="rate, bits/dim")
        right.plot(rate, distortion, color=_BLUE)
        right.plot(rate[:1], distortion[:1], "o", color=_BLUE, markersize=5, clip_on=False)
        right.annotate(
            f"{rate[0]:.3g} bits/dim,\nRMSE {distortion[0]:.2g}",
            (rate[0], distortion[0]),
            (-4, 10),
            textcoords="offset points",
            ha="right",
            color=_GREY,
        )
        right.set(xlabel="rate, bits/dim", ylabel="distortion, RMSE on 0..255")
        for axes in (left, middle, right):
            axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
            axes.grid(alpha=0.25, linewidth=0.6)
        figure.suptitle(title or _summary(bound), x=0.01, ha="left", fontsize=11)
        return _save(figure, path)


def _summary(bound: Bound) -> str:
    total, error = float(bound.total.mean), float(bound.total.standard_error)
    error_text = f" ± {error:.2g}" if np.isfinite(error) else ""
    return f"bound {total:.4g}{error_text} bits/dim, {bound.num_images:,} images"


def _save(figure: Any, path: str | os.PathLike) -> Path:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return Path(path)
