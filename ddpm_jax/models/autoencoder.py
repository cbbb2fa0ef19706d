"""The KL autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752), made of the UNet's blocks."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.blocks import AttentionBlock, Conv, Dense, Downsample, Dtype, GroupNorm, ResBlock, Upsample

_LOG_VARIANCES = (-30.0, 20.0)  # between which they are kept


class Autoencoder(nn.Module):
    """Pictures to the mean and variance of latents, and latents to pictures.

        net = Autoencoder()
        variables = net.init(jax.random.key(0), pictures)
        mean, log_variance = net.apply(variables, pictures, method="encode")           # [B, H / 8, W / 8, 4]
        pictures = net.apply(variables, mean, method="decode")

    The defaults are Stable Diffusion's: 83,653,863 parameters.

    Attributes:
      channels: of a picture.
      latent_channels: of its latents.
      widths: channels of each level, from the full size down; the size is halved from one to the next.
      num_res_blocks: residual blocks a level in the encoder; the decoder has one more.
      num_groups, norm_epsilon: of every GroupNorm.
      middle_attention: attention between the two blocks in the middle of encoder and decoder.
      latent_layers: whether a 1 x 1 convolution follows the encoder, and another goes before the decoder.
      dtype: what convolutions and matrix products compute in; parameters and output are float32.
    """

    channels: int = 3
    latent_channels: int = 4
    widths: Sequence[int] = (128, 256, 512, 512)
    num_res_blocks: int = 2
    num_groups: int = 32
    norm_epsilon: float = 1e-6
    middle_attention: bool = True
    latent_layers: bool = True
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        options: dict[str, Any] = {
            "widths": self.widths,
            "num_groups": self.num_groups,
            "epsilon": self.norm_epsilon,
            "middle_attention": self.middle_attention,
            "dtype": self.dtype,
        }
        self.encoder = _Encoder(2 * self.latent_channels, num_res_blocks=self.num_res_blocks, **options)
        self.decoder = _Decoder(self.channels, num_res_blocks=self.num_res_blocks + 1, **options)
        if self.latent_layers:
            self.to_latents = Dense(2 * self.latent_channels, dtype=self.dtype)
            self.from_latents = Dense(self.latent_channels, dtype=self.dtype)

    @property
    def downscaling(self) -> int:
        """Pixels to a latent, along each side."""
        return 2 ** (len(self.widths) - 1)

    def __call__(self, pictures: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The mean of the latents, and what is decoded from it; an initialisation calls this."""
        mean, _ = self.encode(pictures)
        return mean, self.decode(mean)

    def encode(self, pictures: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance of the latents, float32 [B, h, w, latent_channels].

        Args:
          pictures: [B, H, W, channels] in [-1, 1]; H and W divisible by `downscaling`.

        Raises:
          ValueError: a size that cannot be halved so often, or other channels.
        """
        height, width, channels = pictures.shape[1:]
        if height % self.downscaling or width % self.downscaling:
            raise ValueError(
                f"a picture of {height}x{width} cannot be halved {len(self.widths) - 1} times: height and width must "
                f"be divisible by {self.downscaling}"
            )
        if channels != self.channels:
            raise ValueError(f"the pictures have {channels} channels; accepted: {self.channels}")
        h = self.encoder(pictures.astype(self.dtype))
        h = self.to_latents(h) if self.latent_layers else h
        mean, log_variance = jnp.split(h.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(log_variance, *_LOG_VARIANCES)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Pictures, float32 [B, H, W, channels], of latents [B, h, w, latent_channels]."""
        h = latents.astype(self.dtype)
        h = self.from_latents(h) if self.latent_layers else h
        return self.decoder(h).astype(jnp.float32)


class _Half(nn.Module):
    """What encoder and decoder have in common."""

    features: int
    widths: Sequence[int]
    num_res_blocks: int
    num_groups: int
    epsilon: float
    middle_attention: bool
    dtype: Dtype

    def blocks(self) -> tuple[Any, Any]:
        """The residual block of a width, and the attention."""
        common: dict[str, Any] = {"num_groups": self.num_groups, "epsilon": self.epsilon, "dtype": self.dtype}
        return partial(ResBlock, **common), partial(AttentionBlock, **common)

    def middle(self, h: jax.Array) -> jax.Array:
        residual, attention = self.blocks()
        h = residual(self.widths[-1], name="middle_0_res")(h)
        if self.middle_attention:
            h = attention(name="middle_0_attention")(h)
        return residual(self.widths[-1], name="middle_1_res")(h)

    def out(self, h: jax.Array) -> jax.Array:
        h = nn.swish(GroupNorm(self.num_groups, self.epsilon, name="norm_out")(h))
        return Conv(self.features, dtype=self.dtype, name="conv_out")(h)


class _Encoder(_Half):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        residual, _ = self.blocks()
        h = Conv(self.widths[0], dtype=self.dtype, name="conv_in")(x)
        for level, width in enumerate(self.widths):
            for i in range(self.num_res_blocks):
                h = residual(width, name=f"down_{level}_{i}_res")(h)
            if level < len(self.widths) - 1:
                h = Downsample(dtype=self.dtype, name=f"down_{level}_downsample")(h)
        return self.out(self.middle(h))


class _Decoder(_Half):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        residual, _ = self.blocks()
        h = self.middle(Conv(self.widths[-1], dtype=self.dtype, name="conv_in")(x))
        for level, width in reversed(list(enumerate(self.widths))):
            for i in range(self.num_res_blocks):
                h = residual(width, name=f"up_{level}_{i}_res")(h)
            if level > 0:
                h = Upsample(dtype=self.dtype, name=f"up_{level}_upsample")(h)
        return self.out(h)
