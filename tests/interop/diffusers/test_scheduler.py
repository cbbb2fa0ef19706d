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
    by_level = {"use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas"} & fields.keys()
    leaves_out = "Multistep" in kind and fields.get("timestep_spacing") != "trailing"
    assert config.sample.skip_lowest == (leaves_out and not by_level)
    assert config.sample.fractional == (bool(config.sample.levels) and "Multistep" not in kind)
    ends_early = not fields.get("set_alpha_to_one", kind != "PNDMScheduler") or "final_sigmas_type" in fields
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
    assert config.sample.sampler == "plms"


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("DDIMScheduler", {}, "use_clipped_model_output"),
        ("DDIMScheduler", {"timestep_spacing": "linspace"}, "num_train_timesteps // num_inference_steps"),
        ("DDIMScheduler", {"timestep_spacing": "trailing"}, "if the number of steps does not divide"),
        ("DDPMScheduler", {"timestep_spacing": "trailing"}, "the last step adds no noise here"),
        ("PNDMScheduler", {}, "PNDMScheduler: skip_prk_steps False, which starts with Runge-Kutta steps, is not"),
        ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, "result is x here; in diffusers it is x / a"),
        ("EulerDiscreteScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "abar = 2^-24"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "solver_order 3 is not supported"),
        ("DPMSolverMultistepScheduler", {"solver_type": "heun"}, "solver_type 'heun' is not"),
        (
            "DPMSolverMultistepScheduler",
            {"solver_order": 1, "algorithm_type": "sde-dpmsolver++", "variance_type": "learned_range"},
            "solver_order 1 is not supported; the run uses dpmpp_2m_sde",
        ),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, "algorithm_type 'dpmsolver' is not"),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}, "lambda_min_clipped -5.1: ignored"),
        ("DPMSolverMultistepScheduler", {"use_exponential_sigmas": True}, "called at the nearest timestep here"),
        (
            "DPMSolverMultistepScheduler",
            {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
            "called at the nearest timestep here",
        ),
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, "the last steps keep their order here"),
        ("UniPCMultistepScheduler", {"solver_type": "bh1"}, "solver_type 'bh1' is not supported"),
        ("UniPCMultistepScheduler", {"solver_order": 4}, "solver_order 4 is not"),
        ("UniPCMultistepScheduler", {"disable_corrector": [0]}, "disable_corrector (0,) is not"),
        ("UniPCMultistepScheduler", {"rescale_betas_zero_snr": True}, "abar = 2^-24"),
    ],
)
def test_differences_in_sampling_are_reported(kind, fields, said):
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
        ("DDPMScheduler", {"rescale_betas_zero_snr": True}, "'eps' does not determine the image at the last timestep"),
        ("DDPMScheduler", {"clip_sample_range": 0.0}, "clip_sample_range is 0.0"),
        ("DDPMScheduler", {"clip_sample_range": "wide"}, "clip_sample_range is 'wide'"),
        ("UnCLIPScheduler", {"beta_schedule": "linear"}, "beta_schedule is 'linear'"),
        ("UnCLIPScheduler", {"prediction_type": "v_prediction"}, "prediction_type is 'v_prediction'"),
        ("UnCLIPScheduler", {"variance_type": "fixed_large"}, "variance_type is 'fixed_large'"),
        ("DDPMScheduler", {"thresholding": True, "sample_max_value": 0.5}, "sample_max_value is 0.5"),
        ("DDPMScheduler", {"num_train_timesteps": "many"}, "has an invalid value"),
        ("DDPMScheduler", {"magic": 1}, "magic is 1 in 'scheduler_config.json', but this project does not"),
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
    config, _ = read("DDPMScheduler", thresholding=True, sample_max_value=1.5, dynamic_thresholding_ratio=0.95)
    assert (config.diffusion.dynamic_threshold, config.diffusion.threshold_limit) == (0.95, 1.5)
    assert scheduler.to_fields(config)[0]["sample_max_value"] == 1.5
    config, _ = read(solver, thresholding=True, sample_max_value=1e9, dynamic_thresholding_ratio=0.9)
    assert (config.diffusion.clip, config.diffusion.dynamic_threshold) == (False, 0.9)
    fields, _ = scheduler.to_fields(config)
    assert (fields["thresholding"], fields["sample_max_value"]) == (True, 1e9)


def test_clip_ranges():
    assert read("DDPMScheduler", clip_sample_range=2)[0].diffusion.clip_range == 2.0
    config, _ = read("DDIMScheduler", clip_sample_range=2.5)
    assert scheduler.to_fields(config)[0]["clip_sample_range"] == 2.5
    config.sample.update(sampler="dpmpp_2m", spacing="linspace", levels="logsnr")
    fields, notes = scheduler.to_fields(config)
    assert not fields["thresholding"]
    assert "DPMSolverMultistepScheduler does not clip the predicted x_0 to 2.5, unlike this run" in notes
    assert read("DDPMScheduler", clip_sample=False, clip_sample_range=3.0)[0].diffusion.clip_range == 1.0


PRIOR = {"prediction_type": "sample", "clip_sample_range": 5.0}  # as Karlo's prior has it
DECODER = {"variance_type": "learned_range"}


@pytest.mark.parametrize("fields", [PRIOR, DECODER, {"clip_sample": False, "num_train_timesteps": 50}])
def test_unclip(fields):
    config, notes = read("UnCLIPScheduler", **fields)
    assert notes == []
    assert (config.sample.sampler, config.sample.spacing, config.diffusion.schedule) == ("ddpm", "", "cosine")
    back = scheduler.to_unclip_fields(config)
    expected = {"_class_name": "UnCLIPScheduler", "num_train_timesteps": 1000, "variance_type": "fixed_small_log"}
    expected |= {"clip_sample": True, "clip_sample_range": 1.0, "prediction_type": "epsilon"}
    assert back == {**expected, "beta_schedule": "squaredcos_cap_v2", **fields}


@pytest.mark.parametrize(
    ("part", "field", "value", "said"),
    [
        ("diffusion", "schedule", "linear", "config.diffusion.schedule is 'linear'; accepted by diffusers'"),
        ("diffusion", "betas", (0.1, 0.2), "config.diffusion.betas is (0.1, 0.2)"),
        ("diffusion", "schedule_options", {"offset": 0.1}, "config.diffusion.schedule_options is {'offset': 0.1}"),
        (
            "diffusion",
            "prediction",
            "v",
            "config.diffusion.prediction is 'v'; accepted by diffusers' UnCLIPScheduler: 'eps'",
        ),
        ("diffusion", "variance", "fixed_large", "accepted by diffusers' UnCLIPScheduler: 'fixed_small' or 'learned'"),
        ("sample", "sampler", "ddim", "config.sample.sampler is 'ddim'"),
        ("sample", "spacing", "leading", "config.sample.spacing is 'leading'"),
    ],
)
def test_what_unclip_s_scheduler_does_not_have(part, field, value, said):
    config, _ = read("UnCLIPScheduler")
    with config.unlocked():
        config[part][field] = value
    with pytest.raises(UserError) as caught:
        scheduler.to_unclip_fields(config)
    assert said in str(caught.value)


def test_sigmoid_schedule():
    config, _ = read("DDPMScheduler", beta_schedule="sigmoid", num_train_timesteps=3, beta_start=0.1, beta_end=0.3)
    low = 1 / (1 + math.exp(6))
    expected = [0.1 + 0.2 * low, 0.2, 0.3 - 0.2 * low]
    np.testing.assert_allclose(config.diffusion.betas, expected, rtol=1e-12)
    assert scheduler.to_fields(config)[0]["trained_betas"] == list(config.diffusion.betas)


# Back.

EVEN = {"spacing": "linspace", "levels": "logsnr"}
CONFIGS = {
    "cosine": ({"schedule": "cosine", "prediction": "v", "variance": "fixed_small"}, {}),
    "learned": ({"variance": "learned", "loss": "hybrid", "clip": False}, {}),
    "threshold": ({"prediction": "x_0", "dynamic_threshold": 0.99}, {"sampler": "ddim", "num_steps": 50}),
    "jsd": ({"schedule": "jsd", "prediction": "x_0"}, {"spacing": "trailing"}),
    "zero terminal SNR": ({"zero_terminal_snr": True, "prediction": "v"}, {}),
    "solver": ({"clip": True, "variance": "fixed_small"}, {"sampler": "dpmpp_2m", "num_steps": 20, **EVEN}),
    "unipc": ({"clip": False, "variance": "fixed_small"}, {"sampler": "unipc", "order": 3, "num_steps": 20, **EVEN}),
    "karras": (
        {"clip": False},
        {"sampler": "dpmpp_2m", "num_steps": 20, "spacing": "linspace", "levels": "karras"},
    ),
    "heun": (
        {"clip": False, "prediction": "v"},
        {"sampler": "heun", "spacing": "linspace", "levels": "linspace", "fractional": True, "scaled_start": True}
        | {"num_steps": 50},
    ),
    "euler": ({"clip": False}, {"sampler": "ddim", "spacing": "trailing", "scaled_start": True, "num_steps": 50}),
    "plms": ({"clip": False, "schedule": "quadratic"}, {"sampler": "plms", "num_steps": 50, "stop_at_first": True}),
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
        ({"sampler": "heun"}, "HeunDiscreteScheduler has no spacing 'logsnr'; linspace is written"),
        ({"sampler": "heun", "spacing": "linspace"}, "HeunDiscreteScheduler starts from noise of the first level"),
        ({"sampler": "heun", "spacing": "linspace"}, "HeunDiscreteScheduler calls the network at fractional timesteps"),
        ({"sampler": "ddim", "levels": "karras"}, "DDIMScheduler does not support the noise levels 'karras'"),
        ({"sampler": "unipc", "levels": "logsnr"}, "calls the network at the timestep below, this run at the nearest"),
        ({"sampler": "unipc", "levels": "karras", "fractional": True}, "calls the network at whole timesteps"),
        ({"sampler": "plms"}, "PNDMScheduler does not clip the predicted x_0"),
        ({"sampler": "ddim", "eta": 0.5}, "eta 0.5 is an argument of DDIMScheduler's steps"),
        ({"spacing": "quadratic"}, "DDPMScheduler has no spacing 'quadratic'; linspace is written"),
        ({"stop_at_first": True}, "DDPMScheduler ends at the clean image"),
        ({"skip_lowest": True}, "DDPMScheduler does not leave out the lowest timestep"),
        ({"sampler": "dpmpp_2m", "spacing": "linspace"}, "takes num_steps + 1 timesteps"),
        ({"sampler": "dpmpp_2m"}, "uses the noise levels of spacing 'logsnr' even between timesteps"),
    ],
)
def test_what_diffusers_samples_differently_is_reported(sample, said):
    config = config_lib.default_config()
    config.sample.update(sample)
    _, notes = scheduler.to_fields(config)
    assert any(said in note for note in notes), notes


@pytest.mark.parametrize(
    ("sampler", "diffusion", "said"),
    [
        ("ddim", {"variance": "learned", "loss": "hybrid"}, "DDIMScheduler does not support a learned variance"),
        ("plms", {"prediction": "x_0"}, "PNDMScheduler does not support prediction of x_0; DDPMScheduler is written"),
        ("plms", {"prediction": "v", "zero_terminal_snr": True}, "not support pure noise at the last timestep"),
    ],
)
def test_what_a_scheduler_does_not_take_is_written_as_ddpm(sampler, diffusion, said):
    config = config_lib.default_config()
    config.diffusion.update(diffusion)
    config.sample.sampler = sampler
    fields, notes = scheduler.to_fields(config)
    assert fields["_class_name"] == "DDPMScheduler"
    assert (fields["variance_type"] == "learned_range") == (diffusion.get("variance") == "learned")
    assert any(said in note for note in notes)
