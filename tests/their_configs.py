"""Configs of diffusers' networks and of its schedulers, for the tests that read, run and write them back."""

# A small network of diffusers' defaults: what is not said here is as its training script has it.
DEFAULT = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
# Between them every option that has a counterpart here.
NETWORKS = {
    "diffusers' defaults": {},
    "any widths": {
        "sample_size": (8, 16),
        "in_channels": 2,
        "out_channels": 2,
        "block_out_channels": (16, 24, 40),
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
        "attention_head_dim": 12,  # which divides none of them
        "norm_eps": 1e-3,
        "act_fn": "mish",
    },
    "scale shift, no middle norm": {
        "resnet_time_scale_shift": "scale_shift",
        "attention_head_dim": None,
        "act_fn": "gelu",
        "freq_shift": 1,
        "num_class_embeds": 5,
    },
    "residual resampling": {
        "block_out_channels": (8, 8, 16, 16),
        "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", "UpBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 2,
    },
    "learned time": {
        "time_embedding_type": "learned",
        "num_train_timesteps": 1000,
        "add_attention": False,
        "center_input_sample": True,
        "downsample_padding": 0,
        "act_fn": "relu",
        "dropout": 0.1,
    },
}


def network(name):
    return DEFAULT | NETWORKS[name]


# The network of Stable Diffusion 1.5, and of 2.1.
STABLE_DIFFUSION_1 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
STABLE_DIFFUSION_2 = STABLE_DIFFUSION_1 | {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
    "upcast_attention": True,
    "only_cross_attention": False,
    "dual_cross_attention": False,
    "num_class_embeds": None,
}
# Narrow ones, which between them have every option of a `UNet2DConditionModel` that has a counterpart here.
NARROW = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
CONDITION_NETWORKS = {
    "like 1.x": {},
    "like 2.x": {"attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True},
    "inpainting": {"in_channels": 9},
    "two blocks a transformer": {
        "transformer_layers_per_block": 2,
        "layers_per_block": 2,
        "attention_head_dim": (2, 2),
        "resnet_time_scale_shift": "scale_shift",
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    "other sizes and time": {
        "sample_size": (8, 16),
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 24, 40),
        "down_block_types": ("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (1, 3, 5),
        "downsample_padding": 0,
        "center_input_sample": True,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-3,
        "dropout": 0.1,
    },
}


def condition_network(name):
    return NARROW | CONDITION_NETWORKS[name]


# The schedulers whose steps are this project's: the fields, and the sampler and the timesteps that become the default.
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}, "ddim"),
    "ddim, clipped": ("DDIMScheduler", {}, "ddim"),
    "ddim of Stable Diffusion": (
        "DDIMScheduler",
        {
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
        },
        "ddim",
    ),
    "ddim that ends at its last timestep": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}, "ddim"),
    "ddim, trailing": ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}, "ddim"),
    "ddim, offset alone": ("DDIMScheduler", {"clip_sample": False, "steps_offset": 1}, "ddim"),
    "dpmpp_2m, linspace": ("DPMSolverMultistepScheduler", {}, "dpmpp_2m"),
    "dpmpp_2m, leading": (
        "DPMSolverMultistepScheduler",
        {"timestep_spacing": "leading", "steps_offset": 1, "beta_schedule": "squaredcos_cap_v2"},
        "dpmpp_2m",
    ),
    "dpmpp_2m, trailing": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}, "dpmpp_2m"),
    "dpmpp_2m, clipped": ("DPMSolverMultistepScheduler", {"thresholding": True}, "dpmpp_2m"),
    "dpmpp_2m to sigma_min": ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, "dpmpp_2m"),
    "dpm of order 1": ("DPMSolverMultistepScheduler", {"solver_order": 1}, "ddim"),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde"),
    "sde of order 1": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 1},
        "ddpm",
    ),
    "unipc": ("UniPCMultistepScheduler", {}, "unipc"),
    "unipc of order 3, leading": (
        "UniPCMultistepScheduler",
        {"solver_order": 3, "timestep_spacing": "leading", "trained_betas": [0.001 + i * 1e-5 for i in range(1000)]},
        "unipc",
    ),
    "plms of Stable Diffusion": (
        "PNDMScheduler",
        {
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "set_alpha_to_one": False,
            "skip_prk_steps": True,
            "steps_offset": 1,
        },
        "plms",
    ),
    "plms to the clean image": ("PNDMScheduler", {"set_alpha_to_one": True, "skip_prk_steps": True}, "plms"),
    "heun": ("HeunDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}, "heun"),
    "heun, clipped": ("HeunDiscreteScheduler", {"timestep_spacing": "leading", "clip_sample": True}, "heun"),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}, "ddim"),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "leading"}, "ddpm"),
}
