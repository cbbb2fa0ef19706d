"""Configs of diffusers' networks and of its schedulers, for the tests that read, run and write them back."""

# A small network of diffusers' defaults: other fields are as in its training script.
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
    "two blocks per transformer": {
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


# The networks of Karlo (Kakao Brain's DALL-E 2), of diffusers' script that converts them.
KARLO_DECODER = {
    "sample_size": 64,
    "layers_per_block": 3,
    "down_block_types": ("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
    "up_block_types": (*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "block_out_channels": (320, 640, 960, 1280),
    "in_channels": 3,
    "out_channels": 6,
    "cross_attention_dim": 1536,
    "class_embed_type": "identity",
    "attention_head_dim": 64,
    "resnet_time_scale_shift": "scale_shift",
}
KARLO_SUPER_RESOLUTION = {  # both of its networks
    "sample_size": 256,
    "layers_per_block": 3,
    "down_block_types": ("ResnetDownsampleBlock2D",) * 4,
    "up_block_types": ("ResnetUpsampleBlock2D",) * 4,
    "block_out_channels": (320, 640, 960, 1280),
    "in_channels": 6,
    "out_channels": 3,
    "add_attention": False,
}
# DeepFloyd IF's first stage, and a second one with the blocks that diffusers' script expects. The widths are those that
# give the sizes on their cards, 4.3 and 1.2 billion parameters.
IF_1_XL = KARLO_DECODER | {
    "block_out_channels": (704, 1408, 2112, 2816),
    "cross_attention_dim": 2816,
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 64,
    "cross_attention_norm": "group_norm",
    "class_embed_type": None,
    "act_fn": "gelu",
}
IF_2_L = IF_1_XL | {
    "sample_size": 256,
    "layers_per_block": (2, 2, 3, 5, 5),
    "down_block_types": (*["ResnetDownsampleBlock2D"] * 3, *["SimpleCrossAttnDownBlock2D"] * 2),
    "up_block_types": (*["SimpleCrossAttnUpBlock2D"] * 2, *["ResnetUpsampleBlock2D"] * 3),
    "block_out_channels": (160, 320, 640, 960, 1280),
    "in_channels": 6,
    "cross_attention_dim": 1280,
    "class_embed_type": "timestep",
    "time_embedding_act_fn": "gelu",
    "time_embedding_dim": 1280,
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1 / 0.7071,
    "mid_block_scale_factor": 1 / 0.7071,
    "only_cross_attention": True,
}
# The same, narrow.
_SIMPLE = {
    "sample_size": 8,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "block_out_channels": (16, 32),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "attention_head_dim": 8,
}
CONDITION_NETWORKS |= {
    "Karlo's decoder": KARLO_DECODER | _SIMPLE | {"cross_attention_dim": 12},
    "DeepFloyd IF's first stage": IF_1_XL
    | _SIMPLE
    | {"cross_attention_dim": 64, "encoder_hid_dim": 24, "addition_embed_type_num_heads": 4},
    "DeepFloyd IF's second stage": IF_2_L
    | _SIMPLE
    | {
        "cross_attention_dim": 64,
        "encoder_hid_dim": 24,
        "addition_embed_type_num_heads": 4,
        "layers_per_block": (1, 2),
        "time_embedding_dim": 32,
    },
    "diffusers' test of DeepFloyd IF": IF_2_L
    | _SIMPLE
    | {
        "cross_attention_dim": 64,
        "encoder_hid_dim": 24,
        "addition_embed_type_num_heads": 2,
        "time_embedding_dim": 32,
        "mid_block_scale_factor": 1.414,
        "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1.0,
        "only_cross_attention": False,
    },
    "projected vector": {
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": 6,
        "act_fn": "gelu",
        "layers_per_block": (1, 2),
        "time_embedding_act_fn": "mish",
    },
}
NARROW_SUPER_RESOLUTION = KARLO_SUPER_RESOLUTION | {
    "sample_size": 8,
    "layers_per_block": 1,
    "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
    "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    "block_out_channels": (16, 32),
    "norm_num_groups": 4,
}


def condition_network(name):
    return NARROW | CONDITION_NETWORKS[name]


STABLE_DIFFUSION = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}
# The schedulers whose steps are this project's: the fields, and the sampler and the timesteps that become the default.
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}, "ddim"),
    "ddim, clipped": ("DDIMScheduler", {}, "ddim"),
    "ddim of Stable Diffusion": (
        "DDIMScheduler",
        {**STABLE_DIFFUSION, "clip_sample": False, "set_alpha_to_one": False},
        "ddim",
    ),
    "plms of Stable Diffusion": ("PNDMScheduler", {**STABLE_DIFFUSION, "skip_prk_steps": True}, "plms"),
    "plms to the clean image": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}, "plms"),
    "plms of v": (
        "PNDMScheduler",
        {**STABLE_DIFFUSION, "skip_prk_steps": True, "prediction_type": "v_prediction"},
        "plms",
    ),
    "plms, trailing": ("PNDMScheduler", {"skip_prk_steps": True, "timestep_spacing": "trailing"}, "plms"),
    "ddim that ends at its last timestep": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}, "ddim"),
    "ddim from pure noise": (
        "DDIMScheduler",
        {
            **STABLE_DIFFUSION,
            "steps_offset": 0,
            "clip_sample": False,
            "timestep_spacing": "trailing",
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
        },
        "ddim",
    ),
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
    "dpmpp_2m, karras": (
        "DPMSolverMultistepScheduler",
        {**STABLE_DIFFUSION, "steps_offset": 0, "use_karras_sigmas": True},
        "dpmpp_2m",
    ),
    "dpmpp_2m_sde, lu": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_lu_lambdas": True},
        "dpmpp_2m_sde",
    ),
    "dpmpp_2m, karras, from pure noise": (
        "DPMSolverMultistepScheduler",
        {"use_karras_sigmas": True, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        "dpmpp_2m",
    ),
    "unipc, karras": ("UniPCMultistepScheduler", {"use_karras_sigmas": True}, "unipc"),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}, "ddim"),
    "euler, linspace": ("EulerDiscreteScheduler", {}, "ddim"),
    "euler, trailing": ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, "ddim"),
    "euler, karras": (
        "EulerDiscreteScheduler",
        {**STABLE_DIFFUSION, "timestep_spacing": "leading", "use_karras_sigmas": True},
        "ddim",
    ),
    "euler, exponential": ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}, "ddim"),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "leading"}, "ddpm"),
    "euler ancestral, linspace": ("EulerAncestralDiscreteScheduler", {}, "ddpm"),
    "euler ancestral, trailing": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, "ddpm"),
    "heun": ("HeunDiscreteScheduler", {}, "heun"),
    "heun, leading": ("HeunDiscreteScheduler", {**STABLE_DIFFUSION, "timestep_spacing": "leading"}, "heun"),
    "heun, trailing, clipped": (
        "HeunDiscreteScheduler",
        {"timestep_spacing": "trailing", "clip_sample": True},
        "heun",
    ),
    "heun, karras": ("HeunDiscreteScheduler", {"use_karras_sigmas": True}, "heun"),
}
