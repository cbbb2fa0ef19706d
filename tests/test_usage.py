"""What the command line says of itself."""

import inspect

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


def test_every_parameter_of_a_mode_is_a_flag():
    for functions in modes.FUNCTIONS.values():
        for function in functions.values():
            assert set(inspect.signature(function).parameters) - {"job"} <= set(flags.FLAGS), function
    assert cli.FLAGS is flags.FLAGS
