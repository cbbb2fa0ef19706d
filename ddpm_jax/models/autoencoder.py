"""The autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752), made of the UNet's blocks."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models.blocks import AttentionBlock, Conv, Dense, Downsample, Dtype, GroupNorm, ResBlock, Upsample

LOG_VARIANCE_RANGE = (-30.0, 20.0)


class Autoencoder(nn.Module):
    """Encodes pictures as the distribution of their latents, and decodes latents to pictures.

        net = Autoencoder()
        variables = net.init(jax.random.key(0), pictures)
        mean, log_variance = net.apply(variables, pictures, method="encode")         # [B, H / 8, W / 8, 4] each
        pictures = net.apply(variables, mean, method="decode")                       # [B, H, W, 3]

    The latents of a picture are independent normal variables. The defaults are Stable Diffusion's network, with
    83,653,863 parameters, whose pictures are scaled to [-1, 1].

    The encoder has `num_res_blocks` residual blocks per level and a middle block; each level but the last ends by
    halving the size. The decoder mirrors it with one more residual block per level.

    Attributes:
      channels: channels of the pictures.
      latent_channels: channels of the latents.
      widths: channels of each level, from the full size down.
      num_res_blocks: residual blocks per level in the encoder.
      num_groups: groups of every GroupNorm.
      norm_epsilon: epsilon of every GroupNorm.
      middle_attention: whether both middle blocks have attention, with one head.
      use_quant_conv: whether the encoder ends in a dense layer over the channels of mean and log-variance.
      use_post_quant_conv: whether the decoder begins with a dense layer over the latents' channels.
      dtype: compute dtype of convolutions and matrix products; parameters and results are float32.
    """

    channels: int = 3
    latent_channels: int = 4
    widths: Sequence[int] = (128, 256, 512, 512)
    num_res_blocks: int = 2
    num_groups: int = 32
    norm_epsilon: float = 1e-6
    middle_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        norms = (self.num_groups, self.norm_epsilon)
        options = (tuple(self.widths), self.num_res_blocks, *norms, self.middle_attention, self.dtype)
        self.encoder = _Encoder(2 * self.latent_channels, *options)
        self.decoder = _Decoder(self.channels, *options)
        if self.use_quant_conv:
            self.quant_conv = Dense(2 * self.latent_channels, dtype=self.dtype)
        if self.use_post_quant_conv:
            self.post_quant_conv = Dense(self.latent_channels, dtype=self.dtype)

    def __call__(self, pictures: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The mean of the pictures' latents, and the pictures decoded from it; initialises both halves."""
        mean, _ = self.encode(pictures)
        return mean, self.decode(mean)

    def encode(self, pictures: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The distribution of the pictures' latents.

        Args:
          pictures: [B, H, W, channels] in any float dtype; H and W divisible by `downscaling`.

        Returns:
          mean and log-variance, float32 [B, H / downscaling, W / downscaling, latent_channels] each; the log-variance
          is clipped to [-30, 20].

        Raises:
          ValueError: sizes or channels that do not fit.
        """
        _check("pictures", pictures, self.channels)
        factor, (height, width) = self.downscaling, pictures.shape[1:3]
        if height % factor or width % factor:
            raise ValueError(
                f"pictures of {height}x{width} cannot be halved {len(self.widths) - 1} times: "
                f"with {len(self.widths)} levels height and width must be divisible by {factor}"
            )
        moments = self.encoder(pictures.astype(self.dtype))
        if self.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCE_RANGE)

    def decode(self, latents: jax.Array) -> jax.Array:
        """The pictures of the latents.

        Args:
          latents: [B, h, w, latent_channels] in any float dtype.

        Returns:
          float32 [B, h * downscaling, w * downscaling, channels].

        Raises:
          ValueError: channels that do not fit.
        """
        _check("latents", latents, self.latent_channels)
        latents = latents.astype(self.dtype)
        if self.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents).astype(jnp.float32)

    @property
    def downscaling(self) -> int:
        """The ratio of a picture's side to that of its latents."""
        ratio: int = 2 ** (len(self.widths) - 1)
        return ratio


def _check(name: str, x: jax.Array, channels: int) -> None:
    """ValueError for a different number of axes or channels."""
    if x.ndim != 4 or x.shape[-1] != channels:
        raise ValueError(f"{name} must be [B, H, W, {channels}], not of shape {x.shape}")


class _Half(nn.Module):
    """Options and parts shared by the encoder and the decoder."""

    out_channels: int
    widths: tuple[int, ...]
    num_res_blocks: int
    num_groups: int
    norm_epsilon: float
    middle_attention: bool
    dtype: Dtype

    def _options(self) -> dict[str, Any]:
        return {"num_groups": self.num_groups, "epsilon": self.norm_epsilon, "dtype": self.dtype}

    def _residual(self, h: jax.Array, width: int, name: str) -> jax.Array:
        return ResBlock(width, **self._options(), name=f"{name}_res")(h)

    def _middle(self, h: jax.Array) -> jax.Array:
        h = self._residual(h, self.widths[-1], "middle_0")
        if self.middle_attention:
            h = AttentionBlock(**self._options(), name="middle_0_attention")(h)
        return self._residual(h, self.widths[-1], "middle_1")

    def _begin(self, x: jax.Array, width: int) -> jax.Array:
        return Conv(width, dtype=self.dtype, name="conv_in")(x)

    def _end(self, h: jax.Array) -> jax.Array:
        h = GroupNorm(self.num_groups, self.norm_epsilon, nn.swish, name="norm_out")(h)
        return Conv(self.out_channels, dtype=self.dtype, name="conv_out")(h)


class _Encoder(_Half):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = self._begin(x, self.widths[0])
        for level, width in enumerate(self.widths):
            for i in range(self.num_res_blocks):
                h = self._residual(h, width, f"down_{level}_{i}")
            if level < len(self.widths) - 1:
                h = Downsample(dtype=self.dtype, name=f"down_{level}_downsample")(h)
        return self._end(self._middle(h))


class _Decoder(_Half):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = self._middle(self._begin(x, self.widths[-1]))
        for level, width in reversed(list(enumerate(self.widths))):
            for i in range(self.num_res_blocks + 1):
                h = self._residual(h, width, f"up_{level}_{i}")
            if level > 0:
                h = Upsample(dtype=self.dtype, name=f"up_{level}_upsample")(h)
        return self._end(h)


def param_shapes(net: Autoencoder) -> dict[str, Any]:
    """The parameters as `jax.ShapeDtypeStruct`s."""
    example = jax.ShapeDtypeStruct((1, net.downscaling, net.downscaling, net.channels), jnp.float32)
    shapes: dict[str, Any] = jax.eval_shape(net.init, jax.random.key(0), example)["params"]
    return shapes
