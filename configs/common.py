"""What the experiments share. `default_config` in ddpm_jax/config/defaults.py explains every field."""

from ml_collections import ConfigDict

from ddpm_jax.config import default_config


def paper_32() -> ConfigDict:
    """The paper's recipe for CIFAR-10 at 32x32, which is the default."""
    return default_config()


def paper_256() -> ConfigDict:
    """The paper's recipe for CelebA-HQ and LSUN at 256x256."""
    config = default_config()
    config.data.update(height=256, width=256)
    config.model.update(channel_multipliers=(1, 1, 2, 2, 4, 4), attention_resolutions=(16,), dropout=0.0)
    config.diffusion.variance = "fixed_small"
    config.optimizer.learning_rate = 2e-5
    config.train.batch_size = 64
    config.log.sample_images = 16
    config.sample.update(num_images=16, batch_size=64)
    return config
