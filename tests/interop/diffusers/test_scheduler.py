import dataclasses
import json
import math

import numpy as np
import pytest
from their_configs import DEFAULT, SCHEDULERS

from ddpm_jax import config as config_lib
from ddpm_jax.interop.diffusers import folder, scheduler
from ddpm_jax.runtime.errors import UserError


def read(kind, **fields):
    config = config_lib.default_config()
    notes = scheduler.read(config, {"_class_name": kind, **fields}, "scheduler_config.json")
    return config, notes


@pytest.mark.parametrize("name", SCHEDULERS)
def test_sampler_and_steps(name):
    kind, fields, sampler = SCHEDULERS[name]
    config, _ = read(kind, **fields)
    assert config.sample.sampler == sampler
    assert config.sample.num_steps == (20 if "Multistep" in kind else 50)
    assert config.sample.skip_lowest == ("Multistep" in kind and fields.get("timestep_spacing") != "trailing")
    ends_early = {"set_alpha_to_one": False}.items() <= fields.items() or "final_sigmas_type" in fields
    assert config.sample.stop_at_first == ends_early
    assert config.diffusion.variance == "fixed_small"
    assert config.diffusion.clip == (name.endswith("clipped"))


def test_the_scheduler_of_ddpm():
    config, notes = read("DDPMScheduler")
    assert (config.sample.sampler, config.sample.num_steps, config.sample.spacing) == ("ddpm", 0, "leading")
    assert (config.diffusion.clip, config.diffusion.variance, notes) == (True, "fixed_small", [])
    assert read("DDPMScheduler", timestep_spacing="linspace")[0].sample.spacing == ""


def test_what_diffusers_passes_over():
    """Files that were converted from another scheduler's keep its fields; Stable Diffusion's does."""
    config, _ = read(
        "PNDMScheduler",
        clip_sample=True,
        skip_prk_steps=True,
        steps_offset=1,
        set_alpha_to_one=False,
        tensor_format="pt",
    )
    assert (config.diffusion.clip, config.sample.spacing_offset, config.sample.stop_at_first) == (False, 1, True)


def test_pndm_without_its_runge_kutta_steps():
    config, notes = read("PNDMScheduler", skip_prk_steps=True)
    assert (config.sample.sampler, config.sample.spacing, notes) == ("plms", "", [])
    assert read("PNDMScheduler")[0].sample.sampler == "ddim"


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("DDIMScheduler", {}, "use_clipped_model_output"),
        ("DDIMScheduler", {"timestep_spacing": "linspace"}, "num_train_timesteps // num_inference_steps"),
        ("DDPMScheduler", {"timestep_spacing": "trailing"}, "the last step adds no noise here"),
        ("PNDMScheduler", {}, "skip_prk_steps False begins with Runge-Kutta steps, which this project does not have"),
        ("HeunDiscreteScheduler", {}, "timestep_spacing 'linspace': the start is noise of variance 1"),
        ("HeunDiscreteScheduler", {"use_karras_sigmas": True}, "(spacing 'karras')"),
        ("EulerDiscreteScheduler", {}, "the run's sampler is ddim"),
        ("EulerDiscreteScheduler", {}, "timestep_spacing 'linspace': the start is noise of variance 1"),
        ("EulerAncestralDiscreteScheduler", {}, "the run's sampler is ddpm with its small variance"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "solver_order 3 is not one of this project's methods"),
        ("DPMSolverMultistepScheduler", {"solver_type": "heun"}, "solver_type 'heun' is not"),
        (
            "DPMSolverMultistepScheduler",
            {"solver_order": 1, "algorithm_type": "sde-dpmsolver++", "variance_type": "learned_range"},
            "solver_order 1 is not one of this project's methods; the run's is dpmpp_2m_sde",
        ),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, "algorithm_type 'dpmsolver' is not"),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}, "lambda_min_clipped -5.1: sampling starts at"),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "(spacing 'karras')"),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}, "(spacing 'logsnr')"),
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, "the last steps keep their order here"),
        ("UniPCMultistepScheduler", {"solver_type": "bh1"}, "solver_type 'bh1' is not one of this project's methods"),
        ("UniPCMultistepScheduler", {"solver_order": 4}, "solver_order 4 is not"),
        ("UniPCMultistepScheduler", {"disable_corrector": [0]}, "disable_corrector (0,) is not"),
        ("UniPCMultistepScheduler", {"rescale_betas_zero_snr": True}, "abar 2^-24"),
    ],
)
def test_what_is_sampled_otherwise_is_said(kind, fields, said):
    _, notes = read(kind, **fields)
    assert any(said in note for note in notes), notes
    assert all(note.startswith(f"{kind}: ") for note in notes)


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("LMSDiscreteScheduler", {}, "_class_name is 'LMSDiscreteScheduler'"),
        ("DDPMScheduler", {"beta_schedule": "squared"}, "beta_schedule is 'squared'"),
        ("DDPMScheduler", {"trained_betas": [0.1, 0.2]}, "trained_betas has 2 values"),
        ("DDPMScheduler", {"variance_type": "fixed_large_log"}, "variance_type is 'fixed_large_log'"),
        ("DDPMScheduler", {"prediction_type": "flow"}, "prediction_type is 'flow'"),
        ("DDPMScheduler", {"rescale_betas_zero_snr": True}, "'eps' says nothing at the last timestep"),
        ("DDPMScheduler", {"clip_sample_range": 2.0}, "clip_sample_range is 2.0"),
        ("DDPMScheduler", {"thresholding": True, "sample_max_value": 3.0}, "sample_max_value is 3.0"),
        ("DDPMScheduler", {"num_train_timesteps": "many"}, "holds a value that does not fit"),
        ("DDPMScheduler", {"magic": 1}, "magic is 1 in 'scheduler_config.json', a field that this project"),
        ("DDIMScheduler", {"timestep_spacing": "even"}, "timestep_spacing is 'even'"),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, "prediction_type is 'flow_prediction'"),
        ("DPMSolverMultistepScheduler", {"use_beta_sigmas": True}, "use_beta_sigmas is True"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas is True"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "deis"}, "algorithm_type is 'deis'"),
        ("DPMSolverMultistepScheduler", {"variance_type": "learned"}, "variance_type is 'learned'"),
        ("UniPCMultistepScheduler", {"solver_p": ["a", "b"]}, "solver_p is ['a', 'b']"),
        ("EulerDiscreteScheduler", {"sigma_max": 80.0}, "sigma_max is 80.0"),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, "interpolation_type is 'log_linear'"),
    ],
)
def test_what_is_not_ours(kind, fields, said):
    with pytest.raises(UserError) as caught:
        folder.describe(DEFAULT, {"_class_name": kind, **fields})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_thresholds():
    """A threshold of at most 1 is a clip; an unbounded one is the paper's."""
    solver = "DPMSolverMultistepScheduler"
    assert read(solver, thresholding=True)[0].diffusion.clip
    config, _ = read(solver, thresholding=True, sample_max_value=1e9, dynamic_thresholding_ratio=0.9)
    assert (config.diffusion.clip, config.diffusion.dynamic_threshold) == (False, 0.9)
    fields, _ = scheduler.to_fields(config)
    assert (fields["thresholding"], fields["sample_max_value"]) == (True, 1e9)


def test_sigmoid_schedule():
    config, _ = read("DDPMScheduler", beta_schedule="sigmoid", num_train_timesteps=3, beta_start=0.1, beta_end=0.3)
    low = 1 / (1 + math.exp(6))
    expected = [0.1 + 0.2 * low, 0.2, 0.3 - 0.2 * low]
    np.testing.assert_allclose(config.diffusion.betas, expected, rtol=1e-12)
    assert scheduler.to_fields(config)[0]["trained_betas"] == list(config.diffusion.betas)


# Back.

CONFIGS = {
    "cosine": ({"schedule": "cosine", "prediction": "v", "variance": "fixed_small"}, {}),
    "learned": ({"variance": "learned", "loss": "hybrid", "clip": False}, {}),
    "threshold": ({"prediction": "x_0", "dynamic_threshold": 0.99}, {"sampler": "ddim", "num_steps": 50}),
    "jsd": ({"schedule": "jsd", "prediction": "x_0"}, {"spacing": "trailing"}),
    "zero terminal SNR": ({"zero_terminal_snr": True, "prediction": "v"}, {}),
    "solver": ({"clip": True, "variance": "fixed_small"}, {"sampler": "dpmpp_2m", "num_steps": 20}),
    "unipc": ({"clip": False, "variance": "fixed_small"}, {"sampler": "unipc", "order": 3, "num_steps": 20}),
    "plms": ({"clip": False}, {"sampler": "plms", "num_steps": 50, "spacing_offset": 1, "stop_at_first": True}),
    "heun": ({"clip": True}, {"sampler": "heun", "num_steps": 50, "spacing": "leading"}),
    "heun, karras": ({"clip": False}, {"sampler": "heun", "num_steps": 50, "spacing": "karras"}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_there_and_back(name):
    """The diffusion's options survive; a schedule that diffusers lacks becomes its betas."""
    diffusion, sample = CONFIGS[name]
    config, found = config_lib.default_config(), config_lib.default_config()
    config.diffusion.update({"num_timesteps": 50, "variance": "fixed_small", **diffusion})
    config.sample.update(sample)
    fields, _ = scheduler.to_fields(config)
    scheduler.read(found, json.loads(json.dumps(fields)), "scheduler_config.json")
    assert config_lib.sampling_steps(found) == config_lib.sampling_steps(config)
    ours, theirs = config_lib.parameterization(config), config_lib.parameterization(found)
    if ours.dynamic_threshold:  # which takes the clip's place
        ours, theirs = (dataclasses.replace(output, clip=True) for output in (ours, theirs))
    assert theirs == ours
    np.testing.assert_array_equal(config_lib.make_betas_from(found), config_lib.make_betas_from(config))


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        ({"sampler": "heun"}, "HeunDiscreteScheduler takes the noise levels of spacing 'logsnr' between timesteps too"),
        ({"sampler": "heun", "spacing": "quadratic"}, "HeunDiscreteScheduler has no spacing 'quadratic'"),
        ({"sampler": "plms"}, "PNDMScheduler does not clip x_0, as clip does"),
        ({"sampler": "plms", "spacing": "karras"}, "PNDMScheduler has no spacing 'karras'; linspace is written"),
        ({"sampler": "ddim", "eta": 0.5}, "eta 0.5 is an argument of DDIMScheduler's steps"),
        ({"spacing": "quadratic"}, "DDPMScheduler has no spacing 'quadratic'; linspace is written"),
        ({"stop_at_first": True}, "DDPMScheduler ends at the clean image"),
        ({"skip_lowest": True}, "DDPMScheduler does not leave out the lowest timestep"),
        ({"sampler": "dpmpp_2m", "spacing": "linspace"}, "takes num_steps + 1 timesteps"),
        ({"sampler": "dpmpp_2m"}, "takes the noise levels of spacing 'logsnr' between timesteps too"),
    ],
)
def test_what_diffusers_samples_otherwise_is_said(sample, said):
    config = config_lib.default_config()
    config.sample.update(sample)
    _, notes = scheduler.to_fields(config)
    assert any(said in note for note in notes), notes


@pytest.mark.parametrize(
    ("sampler", "kind"), [("ddim", "DDIMScheduler"), ("plms", "PNDMScheduler"), ("heun", "HeunDiscreteScheduler")]
)
def test_learned_variances_keep_the_scheduler_that_takes_them(sampler, kind):
    config = config_lib.default_config()
    config.diffusion.update(variance="learned", loss="hybrid")
    config.sample.sampler = sampler
    fields, notes = scheduler.to_fields(config)
    assert (fields["_class_name"], fields["variance_type"]) == ("DDPMScheduler", "learned_range")
    assert f"{kind} does not take a learned variance" in notes[0]


@pytest.mark.parametrize(("sampler", "kind"), [("plms", "PNDMScheduler"), ("heun", "HeunDiscreteScheduler")])
def test_zero_terminal_snr_keeps_the_scheduler_that_takes_it(sampler, kind):
    config = config_lib.default_config()
    config.diffusion.update(zero_terminal_snr=True, prediction="v")
    config.sample.sampler = sampler
    fields, notes = scheduler.to_fields(config)
    assert (fields["_class_name"], fields["rescale_betas_zero_snr"]) == ("DDPMScheduler", True)
    assert notes[0] == f"{kind} has no rescale_betas_zero_snr; DDPMScheduler is written"


def test_thresholds_of_schedulers_without_them():
    config = config_lib.default_config()
    config.diffusion.dynamic_threshold = 0.99
    config.sample.update(sampler="heun", spacing="leading")
    _, notes = scheduler.to_fields(config)
    assert notes == ["HeunDiscreteScheduler does not clip x_0 to a dynamic threshold, as dynamic_threshold does"]


def test_the_end_of_ddim_and_plms():
    config = config_lib.default_config()
    config.diffusion.clip = False
    for sampler in ("ddim", "plms"):
        config.sample.update(sampler=sampler, stop_at_first=True)
        fields, notes = scheduler.to_fields(config)
        assert (fields["set_alpha_to_one"], notes) == (False, [])
    config.sample.update(sampler="heun", spacing="leading")
    assert "HeunDiscreteScheduler ends at the clean image" in scheduler.to_fields(config)[1][0]
