"""The curves of a run on its page, which a script in page.html draws."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ddpm_jax.report.elements import number, table, text

_MOST_POINTS = 600  # of a curve


def curves(lines: Sequence[Mapping[str, Any]]) -> str:
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
    options = "".join(f"<option>{text(name)}</option>" for name in others)
    choice = f'<label>of <select id="other-name">{options}</select></label>'
    charts.append(_chart("other", "Another number,", others[:1], choice))
    controls = (
        '<p class="control"><label><input type="checkbox" id="log" checked> logarithmic</label>'
        '<label>smoothing <input type="range" id="smoothing" min="0" max="0.98" step="0.02" value="0.6"></label></p>'
        "<noscript><p>The curves need JavaScript; metrics.jsonl has the numbers.</p></noscript>"
    )
    return controls + "".join(charts) + (_last_by_t(lines, quarters) if quarters else "")


def _chart(name: str, title: str, series: Sequence[str], control: str = "") -> str:
    wanted = text(json.dumps(list(series)))
    return (
        f'<figure class="chart"><figcaption>{text(title)} {control}</figcaption>'
        f'<svg id="chart-{name}" role="img" data-series="{wanted}"></svg>'
        f'<p class="legend"></p></figure>'
    )


def _last_by_t(lines: Sequence[Mapping[str, Any]], quarters: Sequence[str]) -> str:
    last = next(line for line in reversed(lines) if any(name in line for name in quarters))
    rows = [(f"quarter {name[-1]} of the timesteps", number(last[name])) for name in quarters if name in last]
    return table(["Last loss by t", f"step {last['step']:,}"], rows)


def thinned(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
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
