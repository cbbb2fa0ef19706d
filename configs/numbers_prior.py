"""DALL-E 2's prior for handwritten numbers: from a number's name to CLIP's embedding of its picture.

    python main.py --config=configs/numbers_clip.py --workdir=runs/numbers_clip
    python main.py --config=configs/numbers_prior.py --workdir=runs/numbers_prior
    python main.py --config=configs/numbers_decoder.py --workdir=runs/numbers_decoder
    python main.py --mode=compose --stages=runs/numbers_prior,runs/numbers_decoder --workdir=runs/numbers_unclip
    python main.py --mode=sample --workdir=runs/numbers_unclip --prompt="forty-two" --guidance_scale=2

A causal Transformer denoises the embedding. Sampling draws two and keeps the one that matches the text better.
"""

from configs import numbers


def get_config():
    config = numbers.get_config()
    config.text.encoder = config.prior.clip = "runs/numbers_clip"
    config.prior.update(width=128, num_layers=3, num_heads=4)
    config.diffusion.update(prediction="x_0", clip=False)
    config.optimizer.learning_rate = 1e-3
    config.train.num_steps = 1000
    config.sample.sampler = "ddim"
    return config
