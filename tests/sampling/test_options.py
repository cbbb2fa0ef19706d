"""Requests with other options than their own; what the options do is tested with `Run`."""

import dataclasses

import numpy as np
import pytest

from ddpm_jax.diffusion.gaussian import Parameterization
from ddpm_jax.diffusion.guidance import Guidance
from ddpm_jax.diffusion.samplers import Steps
from ddpm_jax.diffusion.schedules import make_schedule
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.sampling.condition import ClassCondition, NoCondition
from ddpm_jax.sampling.generate import Request
from ddpm_jax.sampling.options import OPTIONS, last_timesteps, with_options

OWN = Steps("dpmpp_2m", 10, "leading", spacing_offset=1, skip_lowest=True, order=2)
REQUEST = Request(NoCondition(), OWN, Parameterization(dynamic_threshold=0.9), Guidance())
SCHEDULE = make_schedule("linear", num_timesteps=40)


def test_an_option_that_is_none_stays_as_it_is():
    assert with_options(REQUEST, dict.fromkeys(OPTIONS)) == REQUEST


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"num_steps": 5}, {"num_steps": 5}),
        ({"sampler": "ddim", "eta": 0.5}, {"sampler": "ddim", "eta": 0.5, "order": None, "skip_lowest": False}),
        ({"spacing": "linspace"}, {"spacing": "linspace", "spacing_offset": 0, "skip_lowest": False}),
        ({"timesteps": (5, 3)}, {"timesteps": (5, 3), "num_steps": None}),
        ({"order": 0}, {"order": None}),
    ],
)
def test_steps(options, changed):
    assert with_options(REQUEST, options).steps == dataclasses.replace(OWN, **changed)


def test_output():
    assert with_options(REQUEST, {"clip": False}).output == Parameterization(clip=False)
    assert with_options(REQUEST, {"dynamic_threshold": 0}).output.dynamic_threshold is None


def test_condition_and_guidance():
    request = dataclasses.replace(REQUEST, condition=ClassCondition("abc", dropout=0.1))
    found = with_options(request, {"labels": [2], "guidance_scale": 3.0})
    assert (found.condition.labels, found.guidance.scale) == ((2,), 3.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_step": 4}, "a run has no option 'num_step'. Did you mean 'num_steps'?"),
        ({"num_image": 4}, "a run has no option 'num_image'. Did you mean 'num_images'?"),
        ({"num_steps": [3, 4]}, "num_steps has 2 values; accepted for a single run: one"),
        ({"labels": [1]}, "this run is not class-conditional"),
        ({"guidance_scale": 2.0}, "guidance_scale is 2.0; other than 1 it needs a run"),
    ],
)
def test_refused(options, message):
    with pytest.raises(UserError) as caught:
        with_options(REQUEST, options, others=["num_images"])
    assert message in str(caught.value)


class TestLastTimesteps:
    def test_are_the_lowest_share(self):
        steps = Steps("ddim", 10)
        all_of_them = last_timesteps(steps, SCHEDULE, 1.0)
        assert len(all_of_them) == 10
        np.testing.assert_array_equal(last_timesteps(steps, SCHEDULE, 0.35), all_of_them[-3:])

    @pytest.mark.parametrize(
        ("steps", "strength", "message"),
        [
            (Steps("ddim", 10), 0.0, "strength is 0.0; accepted: above 0 and at most 1"),
            (Steps("ddim", 10), 0.05, "strength is 0.05, which leaves none of 10 steps"),
            (Steps("ddim", 41), 0.5, "num_steps is 41; accepted: 1 to 40"),
        ],
    )
    def test_refused(self, steps, strength, message):
        with pytest.raises(UserError) as caught:
            last_timesteps(steps, SCHEDULE, strength)
        assert message in str(caught.value)
