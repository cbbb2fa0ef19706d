"""The command line's help."""

import pytest


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpshort", "--helpfull"])
def test_help_is_not_a_failure(call, flag):
    status, output = call(flag, config=None)
    assert status == 0
    assert ("--guidance_scale" if flag == "--helpfull" else "--mode=sample --help lists") in output


def test_help_of_a_mode(call):
    status, output = call("--mode=inpaint", "--help", config=None)
    assert status == 0
    assert "--mask " in output
    assert "--topology" not in output


def test_help_beside_a_config_is_of_training(call):
    status, output = call("--config=configs/digits.py", "--help", config=None)
    assert status == 0
    assert output.startswith("--mode=train: ")
    assert "--init_from " in output


def test_without_flags_it_says_what_to_type(call):
    status, output = call(config=None)
    assert status == 0
    assert "python main.py --config=configs/digits.py --workdir=runs/digits" in output
