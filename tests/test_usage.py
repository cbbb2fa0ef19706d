"""The texts of the command line: what to type first, and --help."""

import inspect
import re
import sys

import pytest
from absl import flags

from ddpm_jax import cli, modes, usage

SCREENS, LINES, COLUMNS = 2, 40, 120


def test_every_mode_is_listed():
    assert set(usage.MODES) == set(modes.FUNCTIONS)
    assert set(flags.FLAGS["mode"].parser.enum_values) == set(modes.FUNCTIONS)


def test_the_overview_fits_two_screens():
    lines = usage.overview().splitlines()
    assert len(lines) <= SCREENS * LINES
    assert max(map(len, lines)) <= COLUMNS


@pytest.mark.parametrize("mode", modes.FUNCTIONS)
def test_a_modes_flags_are_those_that_it_takes(mode):
    shown = {line.split()[0] for line in usage.of_mode(mode).splitlines() if line.startswith("  --")}
    taken = set().union(*(modes.flags_of(function) for function in modes.FUNCTIONS[mode].values()))
    assert {f"--{name}" for name in taken} <= shown
    others = {"--topology", "--mask", "--queue"} - {f"--{name}" for name in taken}
    assert not others & shown


def test_a_modes_flags_begin_with_what_is_drawn():
    shown = [line.split()[0] for line in usage.of_mode("inpaint").splitlines() if line.startswith("  --")]
    assert shown[:3] == ["--workdir", "--input", "--mask"]
    assert shown.index("--out") < shown.index("--sampler") < shown.index("--step") < shown.index("--coordinator")


def test_every_parameter_of_a_mode_is_a_flag():
    for functions in modes.FUNCTIONS.values():
        for function in functions.values():
            assert set(inspect.signature(function).parameters) - {"job"} <= set(flags.FLAGS), function
    assert cli.FLAGS is flags.FLAGS


@pytest.mark.parametrize("mode", modes.FUNCTIONS)
def test_the_help_of_a_mode_fits(mode):
    lines = usage.of_mode(mode).splitlines()
    assert len(lines) <= 3 * LINES
    assert max(map(len, lines)) <= COLUMNS
    assert not [line for line in lines[1:] if re.match(rf" *(--\w+ +)?{mode}: ", line, re.IGNORECASE)]
    assert "repeat this option" not in "\n".join(lines)  # absl's remark


def test_it_names_the_program_as_it_was_started(monkeypatch):
    for argv, start in (("../main.py", "python ../main.py"), ("/package/ddpm_jax/__main__.py", "python -m ddpm_jax")):
        monkeypatch.setattr(sys, "argv", [argv])
        for text in (usage.introduction(), usage.overview()):
            assert f"  {start} --" in text or f"  {start} [--mode=MODE]" in text
            assert text.startswith("ddpm_jax trains diffusion models")
