"""Formats a plan as text."""

import math
from typing import Any


def table(result: dict[str, Any]) -> str:
    """The plan as text."""
    is_model, mesh = result["kind"] == "model", result["mesh"]
    devices = f"{result['chips']} x {result['chip']['name'] if is_model else result['device']}"
    where = f"{result['topology']}, {devices}" if is_model else devices
    lines = [
        f"{result['parameters']:,} parameters, {result['dtype']}, remat {result['remat']}, batch {result['batch']}, on "
        f"{where}, mesh data {mesh['data']} fsdp {mesh['fsdp']}",
        "An estimate, not a measurement: the compiled programs' demands at these chips' peak rates."
        if is_model
        else "Measured here, with random weights and images.",
    ]
    for program in result["programs"].values():
        lines += ["", program["title"], *(_model_lines if is_model else _measured_lines)(program, result["chip"])]
        lines += [f"  attention              {sentence}" for sentence in program["attention"]]
    lines += ["", *_run_lines(result)]
    if "ladder" in result:
        lines += ["", *_ladder_lines(result["ladder"])]
    return "\n".join(lines)


def _model_lines(program: dict[str, Any], chip: dict[str, Any]) -> list[str]:
    lines = [
        _line("arithmetic", _amount(program["flops"], "FLOP"), program["arithmetic"]),
        _line("memory traffic", _amount(program["traffic"], "B"), program["memory"])
        + f"  {_amount(program['xla_traffic'], 'B')} by XLA's count, which includes on-chip memory",
        *(_line(f"{c['kind']} of {c['devices']}", _amount(c["bytes"], "B"), None) for c in program["collectives"]),
        _line(f"{program['messages']:.0f} messages", "", program["network"]),
        _line("a call", "", program["seconds"]) + f"  bound by {program['bound']}",
        _line("peak memory", _amount(program["peak_memory"], "B"), None) + f"  of {_amount(chip['memory'], 'B')}",
    ]
    return lines


def _measured_lines(program: dict[str, Any], chip: dict[str, Any] | None) -> list[str]:
    rate = _amount(program["flops"] / program["seconds"], "FLOP/s")
    use = (
        f"  {program['utilisation']:.1%} of the bfloat16 peak: model-FLOP utilisation"
        if chip
        else "  of an unknown peak"
    )
    return [
        _line("arithmetic", _amount(program["flops"], "FLOP"), None),
        _line("a call", rate, program["seconds"]) + use,
    ]


def _line(name: str, amount: str, seconds: float | None) -> str:
    time = "" if seconds is None else f"{1e3 * seconds:.3f} ms"
    return f"  {name:22} {amount:>14} {time:>12}".rstrip()


def _amount(value: float, unit: str) -> str:
    power = min(int(math.log10(value) / 3), 5) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {' kMGTP'[power].strip()}{unit}"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _run_lines(result: dict[str, Any]) -> list[str]:
    run, lines = result["run"], []
    if "train" in run:
        train = run["train"]
        lines.append(
            f"{result['steps']:,} steps: {train['steps_per_second']:.3g} steps/s, {_rate(train['images_per_second'])} "
            f"images/s, {_duration(24 * 3600 * train['days'])}, {train['chip_hours']:,.3g} chip-hours"
        )
    for name, what in (("sample", "samples"), ("decode", "decoded"), ("evaluate", "images evaluated")):
        if name in run:
            found = run[name]
            rate = _rate(found["images_per_second_and_chip"])
            lines.append(
                f"{found['images']:,} {what}: {rate} images/s and chip, {_duration(3600 * found['hours'])}, "
                f"{found['chip_hours']:.3g} chip-hours"
            )
    return lines


def _ladder_lines(ladder: list[dict[str, Any]]) -> list[str]:
    lines = [
        "The training step on other slices, for as many images as in the run:",
        f"{'chips':>5} {'batch':>6} {'arithmetic':>11} {'memory':>9} {'network':>9} {'steps/s':>8} {'images/s':>9} "
        f"{'time':>12} {'chip-hours':>10}",
    ]
    for rung in ladder:
        times = (f"{1e3 * rung[name]:.2f} ms" for name in ("arithmetic", "memory", "network"))
        lines.append(
            "{:>5} {:>6} {:>11} {:>9} {:>9}".format(rung["chips"], rung["batch"], *times)
            + f" {rung['steps_per_second']:8.3g} {rung['images_per_second']:9,.0f} "
            f"{_duration(24 * 3600 * rung['days']):>12} {rung['chip_hours']:10,.4g}  {rung['how']}"
        )
    return [
        *lines,
        "compiled: as above. same program: the compiled one, with its all-reduce on more chips. estimated: its "
        "arithmetic and memory traffic scaled with the batch, except the state's traffic.",
    ]
