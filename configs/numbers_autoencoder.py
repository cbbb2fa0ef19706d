"""An autoencoder of the numbers' pictures, 8x16 grey to latents of 4x8x4: about a minute on two cores.

    python main.py --config=configs/numbers_autoencoder.py --workdir=runs/numbers_autoencoder

The first half of latent diffusion (Rombach et al. 2022); `configs/numbers_latent.py` is the second. The held-out
numbers are not in its training set either. Its samples/ show training pictures beside their reconstructions.
"""

from configs import numbers


def get_config():
    config = numbers.get_config()
    config.train.objective = "autoencoder"
    config.text.encoder = ""
    config.autoencoder.update(level_channels=(32, 32), latent_channels=4, num_res_blocks=1, num_groups=8)
    config.autoencoder.update(middle_attention=False, kl_weight=1e-3)
    config.optimizer.update(learning_rate=2e-3, warmup_steps=50)
    config.train.update(num_steps=600)
    config.log.update(sample_every_steps=200)
    return config
