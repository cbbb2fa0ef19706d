"""Evaluation results: evaluation.json, which keeps all of them, and tables for reading."""

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddpm_jax.runtime.files import read_json, write_text
from ddpm_jax.runtime.lock import hold

RESULTS, TABLE = "evaluation.json", "evaluation.md"
INTERVAL, FLOOR = ", 95 % interval", ", floor"  # after a metric's name


def record(folder: Path, result: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Adds a result to evaluation.json, and writes the table of all results to evaluation.md.

    Args:
      folder: of these files.
      result: metrics and what they were computed from.
      settings: how the samples were made.
    """
    path = folder / RESULTS
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with hold(folder / f".{RESULTS}.lock", "recording", wait=True):  # else two at once would lose one result
        history = read_json(path, [])
        history.append({"time": time, **result, **settings, "metrics": metric_names(result)})
        write_text(path, json.dumps(history, indent=2) + "\n")
        write_text(folder / TABLE, _table(history))


def lines(result: Mapping[str, Any]) -> list[str]:
    """A result as text: one line per metric with its interval or deviation and its floor; notes at the end."""
    rows = []
    for name in result:
        if _is_beside(name) or name.endswith(FLOOR) or name in _REMARKS:
            continue
        floor = f"floor {_cell(result[name + FLOOR])}" if name + FLOOR in result else ""
        rows.append((name, with_spread(result, name), floor))
    width = max(len(name) for name, _, _ in rows)
    text = [f"{name:{width}}  {value}{'  ' * bool(floor)}{floor}" for name, value, floor in rows]
    remarks = [result.get("note", ""), f"Not computed: {result['not computed']}." if "not computed" in result else ""]
    return text + [remark for remark in remarks if remark]


_REMARKS = ("note", "not computed", "metrics")


def metric_names(result: Mapping[str, Any]) -> list[str]:
    """The metrics in a result: its numbers except counts and intervals."""
    return [name for name, value in result.items() if isinstance(value, float) and not _is_beside(name)]


def _is_beside(name: str) -> bool:
    """Whether a number is shown in brackets after another."""
    return name.endswith((INTERVAL, ", standard error")) or ", deviation of " in name


def with_spread(entry: Mapping[str, Any], name: str) -> str:
    """A number of a result as text, with its interval, error or deviation in brackets."""
    spread = [more for more in entry if _is_beside(more) and more.startswith(f"{name}, ")]
    return " ".join([_cell(entry.get(name, "")), *(f"({_cell(entry[more])})" for more in spread)])


def _table(history: list[dict[str, Any]]) -> str:
    """One line per evaluation: a metric's value with its interval or deviation, then its floor in the next column."""
    names = dict.fromkeys(name for entry in history for name in entry)
    columns = [name for name in names if not _is_beside(name) and name not in _REMARKS]
    text = ["# Evaluations", "", f"| {' | '.join(columns)} |", f"|{'-|' * len(columns)}"]
    text += [f"| {' | '.join(with_spread(entry, name) for name in columns)} |" for entry in history]
    notes = [f"- {entry['time']}: {entry['note']}" for entry in history if "note" in entry]
    notes += [
        f"- {entry['time']}: not computed: {entry['not computed']}." for entry in history if "not computed" in entry
    ]
    key = (
        "In brackets: a bootstrap interval of 95 %, as a to b, a standard error, or a deviation over subsets or splits."
    )
    return "\n".join([*text, "", key, "", *notes, ""])


def _cell(value: Any) -> str:
    if isinstance(value, list) and len(value) == 2 and all(isinstance(x, float) for x in value):
        return f"{value[0]:.5g} to {value[1]:.5g}"
    return f"{value:.5g}" if isinstance(value, float) else "" if value is None else str(value)
