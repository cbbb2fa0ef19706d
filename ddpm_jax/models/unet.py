"""The UNet that predicts the noise: the original's network (Ho et al. 2020, appendix B) and its common variants."""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models import layers
from ddpm_jax.models.blocks import (
    AttentionBlock,
    Conv,
    Dense,
    Downsample,
    Dtype,
    GroupNorm,
    ResBlock,
    Upsample,
    timestep_embedding,
)

DOWNSAMPLING = ("conv", "avg_pool", "max_pool")
UPSAMPLING = ("nearest", "transposed")
REMAT = ("none", "norms", "blocks")
CONDITIONING = ("label", "vector", "image", "tokens")


class UNet(nn.Module):
    """eps_theta(x_t, t).

        net = UNet(channels=128, channel_multipliers=(1, 2, 2, 2), attention_resolutions=(16,), dropout=0.1)
        variables = net.init(jax.random.key(0), x, t)
        eps = net.apply(variables, x, t)                                             # [B, H, W, C]
        eps = net.apply(variables, x, t, train=True, rngs={"dropout": key})          # with dropout

    The defaults are the original's CIFAR-10 network: 35,746,307 parameters on 32x32x3. The encoder has
    `num_res_blocks` residual blocks a level, each level but the last ending in a halving of the size; the decoder
    mirrors it with one block more a level, each taking the encoder's output of the same place.

    Attributes:
      channels: base width; level i has channels * channel_multipliers[i].
      channel_multipliers: one a level, from the full size down.
      num_res_blocks: residual blocks a level in the encoder.
      attention_resolutions: a level has attention when its longer side is one of these.
      attention_levels: on or off for each level; takes the place of attention_resolutions.
      middle_attention: attention in the middle block.
      num_heads: heads of every attention.
      attention_patch_size: side of the patches that are attention's tokens; 1: pixels.
      dropout: rate before the second convolution of each residual block, with train=True.
      num_groups: groups of every GroupNorm.
      scale_shift: the time embedding scales and shifts the second norm (Improved DDPM) instead of being added.
      downsample: "conv" (stride 2), "avg_pool" or "max_pool".
      upsample: "nearest" (then a convolution) or "transposed" (4x4, stride 2).
      out_channels: channels of the output; None: as many as the input has.
      learned_variance: the output has as many channels again, the variance's interpolation (Improved DDPM).
      num_classes: None, or how many classes `cond["label"]` may name. Label num_classes is the null class.
      dtype: what convolutions and matrix products compute in; parameters and output are float32.
      remat: what the backward pass computes again instead of keeping it: "norms", in residual blocks all but their
        convolutions, which is cheap where memory is slower than arithmetic; "blocks", all in residual and attention
        blocks.
    """

    channels: int = 128
    channel_multipliers: Sequence[int] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: Sequence[int] = (16,)
    attention_levels: Sequence[bool] | None = None
    middle_attention: bool = True
    num_heads: int = 1
    attention_patch_size: int = 1
    dropout: float = 0.0
    num_groups: int = 32
    scale_shift: bool = False
    downsample: str = "conv"
    upsample: str = "nearest"
    out_channels: int | None = None
    learned_variance: bool = False
    num_classes: int | None = None
    dtype: Dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, cond: Mapping[str, jax.Array] | None = None, *, train: bool = False
    ) -> jax.Array:
        """Predicts the noise (or x_0, or v: what the loss trains it to).

        Args:
          x: [B, H, W, C] in any float dtype; H and W divisible by 2 ** (levels - 1).
          t: [B], integer or float.
          cond: None or a dict of any of
            "label": int32 [B] in 0..num_classes (num_classes: no class);
            "vector": [B, D], added to the time embedding through a dense layer (a pooled text embedding, say);
            "image": [B, H, W, D], joined to x's channels (a low-resolution or masked picture);
            "tokens": [B, L, D], which every attention block also attends to (a text encoder's output).
            A network is initialised with the entries that it will be called with.
          train: whether to drop out; needs rngs={"dropout": key}.

        Returns:
          float32 [B, H, W, out_channels], doubled with learned_variance.

        Raises:
          ValueError: sizes, channels or conditioning that do not fit, in words.
        """
        cond = dict(cond or {})
        self._check(x, t, cond)
        out_channels = self.out_channels or x.shape[-1]
        common = {"num_groups": self.num_groups, "dtype": self.dtype}
        res_block, attention_block = ResBlock, AttentionBlock
        if self.remat == "norms":
            res_block = nn.remat(ResBlock, policy=jax.checkpoint_policies.save_only_these_names(layers.KEPT))
        elif self.remat == "blocks":
            res_block, attention_block = nn.remat(ResBlock), nn.remat(AttentionBlock)

        embedding = timestep_embedding(t, self.channels)
        embedding = nn.swish(Dense(4 * self.channels, name="time_0")(embedding))
        embedding = Dense(4 * self.channels, name="time_1")(embedding)
        if self.num_classes is not None:
            labels = nn.Embed(self.num_classes + 1, 4 * self.channels, name="label")
            embedding += labels(cond.get("label", jnp.full(x.shape[:1], self.num_classes)))
        if "vector" in cond:
            embedding += Dense(4 * self.channels, name="vector")(cond["vector"])
        embedding = nn.swish(embedding).astype(self.dtype)

        def block(h: jax.Array, level: int, name: str, attention: bool, skip: jax.Array | None = None) -> jax.Array:
            features = self.channels * self.channel_multipliers[level]
            h = res_block(features, self.dropout, self.scale_shift, train=train, name=f"{name}_res", **common)(
                h, embedding, skip
            )
            if attention:
                h = attention_block(self.num_heads, self.attention_patch_size, name=f"{name}_attention", **common)(
                    h, cond.get("tokens")
                )
            return h

        last = len(self.channel_multipliers) - 1
        attends = self.levels_with_attention(*x.shape[1:3])

        h = x.astype(self.dtype)
        if "image" in cond:
            h = jnp.concatenate([h, cond["image"].astype(self.dtype)], axis=-1)
        h = Conv(self.channels, dtype=self.dtype, name="conv_in")(h)
        skips = [h]
        for level in range(last + 1):
            for i in range(self.num_res_blocks):
                h = block(h, level, f"down_{level}_{i}", attends[level])
                skips.append(h)
            if level < last:
                h = Downsample(self.downsample, dtype=self.dtype, name=f"down_{level}_downsample")(h)
                skips.append(h)

        h = block(h, last, "middle_0", self.middle_attention)
        h = block(h, last, "middle_1", False)

        for level in reversed(range(last + 1)):
            for i in range(self.num_res_blocks + 1):
                h = block(h, level, f"up_{level}_{i}", attends[level], skips.pop())
            if level > 0:
                h = Upsample(self.upsample, dtype=self.dtype, name=f"up_{level}_upsample")(h)

        h = nn.swish(GroupNorm(self.num_groups, name="norm_out")(h))
        out_channels *= 2 if self.learned_variance else 1
        h = Conv(out_channels, init_scale=0.0, dtype=self.dtype, name="conv_out")(h)
        return h.astype(jnp.float32)

    def levels_with_attention(self, height: int, width: int) -> list[bool]:
        """Whether each level, from the full size down, has attention on images of this size."""
        if self.attention_levels is not None:
            return list(self.attention_levels)
        longer_side = max(height, width)
        return [longer_side >> level in self.attention_resolutions for level in range(len(self.channel_multipliers))]

    def _check(self, x: jax.Array, t: jax.Array, cond: Mapping[str, jax.Array]) -> None:
        for name, value, accepted in (
            ("downsample", self.downsample, DOWNSAMPLING),
            ("upsample", self.upsample, UPSAMPLING),
            ("remat", self.remat, REMAT),
        ):
            if value not in accepted:
                raise ValueError(f"{name} is {value!r}; accepted: {', '.join(accepted)}")
        levels = len(self.channel_multipliers)
        if self.attention_levels is not None and len(self.attention_levels) != levels:
            raise ValueError(f"attention_levels has {len(self.attention_levels)} entries for {levels} levels")
        if x.ndim != 4:
            raise ValueError(f"x must be [B, H, W, C], not of shape {x.shape}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must have shape {x.shape[:1]}, one entry an image, not {t.shape}")
        factor = 2 ** (levels - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f"an image of {x.shape[1]}x{x.shape[2]} cannot be halved {levels - 1} times: "
                f"with {levels} channel_multipliers height and width must be divisible by {factor}"
            )
        unknown = [name for name in cond if name not in CONDITIONING]
        if unknown:
            raise ValueError(f"cond has {unknown[0]!r}; accepted: {', '.join(CONDITIONING)}")
        if "label" in cond and self.num_classes is None:
            raise ValueError("cond has 'label', but the network has no classes (num_classes is None)")
