"""The UNet that predicts the noise: the original's network (Ho et al. 2020, appendix B) and its common variants."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddpm_jax.models import layers
from ddpm_jax.models.blocks import (
    ACTIVATIONS,
    CROSS_ATTENTION,
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
from ddpm_jax.models.pooling import TokenPooling
from ddpm_jax.models.spatial import SpatialTransformer

DOWNSAMPLING = ("conv", "avg_pool", "max_pool", "residual")
DOWNSAMPLE_PADDING = ("same", "symmetric")
UPSAMPLING = ("nearest", "transposed", "residual")
TIME_EMBEDDINGS = ("sinusoids", "learned")
REMAT = ("none", "norms", "blocks")
VECTOR_EMBEDDINGS = ("linear", "mlp", "none")
CONDITIONING = ("label", "vector", "image", "tokens", "tokens_mask", "level")

_Layer = Callable[..., jax.Array]


class UNet(nn.Module):
    """eps_theta(x_t, t).

        net = UNet(channels=128, channel_multipliers=(1, 2, 2, 2), attention_resolutions=(16,), dropout=0.1)
        variables = net.init(jax.random.key(0), x, t)
        eps = net.apply(variables, x, t)                                             # [B, H, W, C]
        eps = net.apply(variables, x, t, train=True, rngs={"dropout": key})          # with dropout

    The defaults are the original's CIFAR-10 network: 35,746,307 parameters on 32x32x3. The encoder has
    `num_res_blocks` residual blocks per level, and each level but the last ends by halving the size. The decoder
    mirrors it with one more block per level, each of which also takes the corresponding output of the encoder.

    Attributes:
      channels: base width, of the first convolution; level i has channels * channel_multipliers[i].
      channel_multipliers: one per level, from the full size down.
      level_channels: the width of each level; replaces channel_multipliers.
      num_res_blocks: residual blocks per level in the encoder.
      level_res_blocks: the residual blocks of each level in the encoder; replaces num_res_blocks.
      attention_resolutions: a level has attention if its longer side is one of these.
      attention_levels: whether each level has attention; replaces attention_resolutions.
      middle_attention: whether the middle block has attention.
      middle_attention_groups: groups of the norm before that attention; 0: no norm; None: num_groups.
      num_heads: heads of every attention.
      head_channels: channels of a head; each level has as many heads as fit. Replaces num_heads.
      attention_patch_size: side of the patches that are attention's tokens; 1: pixels.
      transformer_depth: blocks of the `SpatialTransformer` that replaces each attention, as in Stable Diffusion; 0:
        plain attention. It needs `cond["tokens"]` and supports neither patches nor middle_attention_groups.
      cross_attention: how attention without a transformer uses `cond["tokens"]`: "separate" (a second attention after
        the pixels'), "joint" (in one softmax with the pixels) or "alone" (instead of the pixels); the last two need the
        tokens.
      context_groups: groups of the tokens' norm in every "joint" or "alone" attention; 0: no norm.
      token_channels: width that `cond["tokens"]` are projected to first; None: no projection.
      pooling_heads: heads of the `TokenPooling` of `cond["tokens"]` that is added to the time embedding; 0: no pooling.
      dropout: rate before the second convolution of each residual block, with train=True.
      num_groups: groups of every GroupNorm.
      norm_epsilon: epsilon of every GroupNorm except that of a spatial transformer, 1e-6.
      activation: in the residual blocks: "swish", "gelu", "mish" or "relu".
      outer_activation: the same inside the time embedding and before the last convolution.
      residual_scale: divisor of the sum of a residual block's branches; 2 ** 0.5 keeps the variance.
      middle_residual_scale: the same in the middle block.
      skip_scale: factor of the skip connections; 2 ** -0.5 in Imagen's Efficient U-Net (Saharia et al. 2022, B.1).
      time_embedding: "sinusoids", or "learned", one vector for each of num_timesteps.
      time_frequency_shift, time_cosines_first: of the sinusoids; see `blocks.timestep_embedding`.
      num_timesteps: number of vectors of a learned time embedding.
      time_channels: width of the time embedding; None: 4 * channels.
      time_activations: applied in turn to the whole embedding before it enters the residual blocks; none: activation.
      vector_embedding: how `cond["vector"]` is embedded: "linear" (a dense layer), "mlp" (two, with swish between them)
        or "none", if it already has the time embedding's width.
      scale_shift: whether the time embedding scales and shifts the second norm (Improved DDPM) instead of being added.
      downsample: "conv" (stride 2), "avg_pool", "max_pool" or "residual" (a residual block that halves the size).
      downsample_padding: for "conv": "same", at the right and bottom, or "symmetric", one pixel on every side.
      downsample_levels: one method for each halving, from the full size down; replaces downsample.
      upsample: "nearest" (then a convolution), "transposed" (4x4, stride 2) or "residual".
      upsample_levels: one method for each doubling, in the order of the halvings that they undo; replaces upsample.
      center_input: whether the network is applied to 2 x - 1.
      out_channels: channels of the output; None: as many as the input has.
      learned_variance: whether the output has twice the channels, the second half for the variance's interpolation
        (Improved DDPM).
      num_classes: number of classes of `cond["label"]`; None: no classes.
      null_class: whether the label num_classes means no class; without it, every call must name a class.
      dtype: compute dtype of convolutions and matrix products; parameters and output are float32.
      remat: what the backward pass recomputes instead of storing: "none"; "norms", everything in residual blocks except
        convolutions, which is cheap if memory is slower than arithmetic; "blocks", everything in residual and attention
        blocks.
    """

    channels: int = 128
    channel_multipliers: Sequence[int] = (1, 2, 2, 2)
    level_channels: Sequence[int] | None = None
    num_res_blocks: int = 2
    level_res_blocks: Sequence[int] | None = None
    attention_resolutions: Sequence[int] = (16,)
    attention_levels: Sequence[bool] | None = None
    middle_attention: bool = True
    middle_attention_groups: int | None = None
    num_heads: int = 1
    head_channels: int | None = None
    attention_patch_size: int = 1
    transformer_depth: int = 0
    cross_attention: str = "separate"
    context_groups: int = 0
    token_channels: int | None = None
    pooling_heads: int = 0
    dropout: float = 0.0
    num_groups: int = 32
    norm_epsilon: float = 1e-6
    activation: str = "swish"
    outer_activation: str = "swish"
    residual_scale: float = 1.0
    middle_residual_scale: float = 1.0
    skip_scale: float = 1.0
    time_embedding: str = "sinusoids"
    time_frequency_shift: float = 1.0
    time_cosines_first: bool = False
    num_timesteps: int | None = None
    time_channels: int | None = None
    time_activations: Sequence[str] = ()
    vector_embedding: str = "linear"
    scale_shift: bool = False
    downsample: str = "conv"
    downsample_padding: str = "same"
    downsample_levels: Sequence[str] | None = None
    upsample: str = "nearest"
    upsample_levels: Sequence[str] | None = None
    center_input: bool = False
    out_channels: int | None = None
    learned_variance: bool = False
    num_classes: int | None = None
    null_class: bool = True
    dtype: Dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, cond: Mapping[str, jax.Array] | None = None, *, train: bool = False
    ) -> jax.Array:
        """Predicts the noise (or x_0 or v, depending on the loss).

        Args:
          x: [B, H, W, C] in any float dtype; H and W divisible by 2 ** (levels - 1). If downsampling pads symmetrically
            and upsampling is "nearest", any size is accepted: halving rounds up, as in Stable Diffusion.
          t: [B], integer or float; integer with a learned time embedding.
          cond: None or a dict of any of
            "label": int32 [B] in 0..num_classes (num_classes means no class, if there is a null class);
            "vector": [B, D], added to the time embedding (a pooled text embedding, say); see vector_embedding;
            "level": [B], embedded like t and added to the time embedding (the noise level of the "image", say);
            "image": [B, H, W, D], concatenated to x's channels (an enlarged low-resolution picture, or a masked one);
            "tokens": [B, L, D], which every attention block also attends to (a text encoder's output);
            "tokens_mask": bool [B, L], the tokens to attend to, at least one per image; without it, all.
            Initialise the network with the entries that it will be called with.
          train: whether to apply dropout; needs rngs={"dropout": key}.

        Returns:
          float32 [B, H, W, out_channels], doubled with learned_variance.

        Raises:
          ValueError: sizes, channels or conditioning that do not fit.
        """
        cond = dict(cond or {})
        self._check(x, t, cond)
        out_channels = self.out_channels or x.shape[-1]
        widths, res_blocks = self.widths, self.res_blocks
        outer_activation = ACTIVATIONS[self.outer_activation]
        res_block, attention_block, spatial_transformer = ResBlock, AttentionBlock, SpatialTransformer
        if self.remat == "norms":
            res_block = nn.remat(ResBlock, policy=jax.checkpoint_policies.save_only_these_names(layers.KEPT))
        elif self.remat == "blocks":
            res_block, attention_block = nn.remat(ResBlock), nn.remat(AttentionBlock)
            spatial_transformer = nn.remat(SpatialTransformer)
        common: dict[str, Any] = {"num_groups": self.num_groups, "epsilon": self.norm_epsilon, "dtype": self.dtype}
        options: dict[str, Any] = {"scale_shift": self.scale_shift, "activation": self.activation, "train": train}
        residual: Callable[..., _Layer] = partial(
            res_block, dropout=self.dropout, residual_scale=self.residual_scale, **options, **common
        )
        heads: dict[str, Any] = {"num_heads": self.num_heads, "head_channels": self.head_channels}
        attention: Callable[..., _Layer] = partial(
            attention_block,
            patch_size=self.attention_patch_size,
            cross_attention=self.cross_attention,
            context_groups=self.context_groups,
            **heads,
        )
        transformer: Callable[..., _Layer] = partial(
            spatial_transformer,
            self.transformer_depth,
            num_heads=None if self.head_channels else self.num_heads,
            head_width=self.head_channels,
            num_groups=self.num_groups,
            dtype=self.dtype,
        )

        time_channels = self.time_channels or 4 * self.channels

        def sinusoids(t: jax.Array) -> jax.Array:
            return timestep_embedding(
                t,
                self.channels,
                frequency_shift=self.time_frequency_shift,
                cosines_first=self.time_cosines_first,
            )

        def mlp(name: str, x: jax.Array, activation: Callable[[jax.Array], jax.Array]) -> jax.Array:
            return Dense(time_channels, name=f"{name}_1")(activation(Dense(time_channels, name=f"{name}_0")(x)))

        if self.time_embedding == "learned":
            embedding = nn.Embed(self.num_timesteps or 0, self.channels, name="time_table")(t)
        else:
            embedding = sinusoids(t)
        embedding = mlp("time", embedding, outer_activation)
        if self.num_classes is not None:
            # Without a null class, only initialisation may omit the classes; any class will do there.
            rows, absent = (self.num_classes + 1, self.num_classes) if self.null_class else (self.num_classes, 0)
            labels = nn.Embed(rows, time_channels, name="label")
            embedding += labels(cond.get("label", jnp.full(x.shape[:1], absent)))
        if "vector" in cond and self.vector_embedding == "linear":
            embedding += Dense(time_channels, name="vector")(cond["vector"])
        elif "vector" in cond:
            embedding += mlp("vector", cond["vector"], nn.swish) if self.vector_embedding == "mlp" else cond["vector"]
        if "level" in cond:
            embedding += mlp("level", sinusoids(cond["level"]), outer_activation)
        tokens: jax.Array | None = cond.get("tokens")
        tokens_mask: jax.Array | None = cond.get("tokens_mask")
        if tokens is not None and self.pooling_heads:
            embedding += TokenPooling(time_channels, self.pooling_heads, name="pooling")(tokens, tokens_mask)
        if tokens is not None and self.token_channels:
            tokens = Dense(self.token_channels, dtype=self.dtype, name="tokens")(tokens)
        for name in self.time_activations or (self.activation,):
            embedding = ACTIVATIONS[name](embedding)
        embedding = embedding.astype(self.dtype)

        def block(
            h: jax.Array, level: int, name: str, attends: bool, skip: jax.Array | None = None, **middle: Any
        ) -> jax.Array:
            h = residual(widths[level], name=f"{name}_res", **middle)(h, embedding, skip)
            if attends and self.transformer_depth:
                return transformer(name=f"{name}_transformer")(h, tokens, tokens_mask)
            if attends:
                groups = self.middle_attention_groups if middle else None
                norm = common if groups is None else {**common, "num_groups": groups}
                return attention(name=f"{name}_attention", **norm)(h, tokens, tokens_mask)
            return h

        def downsample(h: jax.Array, level: int, method: str) -> jax.Array:
            name = f"down_{level}_downsample"
            if method == "residual":
                return residual(widths[level], resample="down", name=name)(h, embedding)
            return Downsample(method, self.downsample_padding == "symmetric", dtype=self.dtype, name=name)(h)

        def upsample(h: jax.Array, level: int, method: str) -> jax.Array:
            name = f"up_{level}_upsample"
            if method == "residual":
                return residual(widths[level], resample="up", name=name)(h, embedding)
            return Upsample(method, dtype=self.dtype, name=name)(h, skips[-1].shape[1:3])

        last = len(widths) - 1
        downsampling = self.downsample_levels or [self.downsample] * last
        upsampling = self.upsample_levels or [self.upsample] * last
        attends = self.levels_with_attention(*x.shape[1:3])

        h = x.astype(self.dtype)
        if self.center_input:
            h = 2 * h - 1
        if "image" in cond:
            h = jnp.concatenate([h, cond["image"].astype(self.dtype)], axis=-1)
        h = Conv(self.channels, dtype=self.dtype, name="conv_in")(h)
        skips = [h]
        for level in range(last + 1):
            for i in range(res_blocks[level]):
                h = block(h, level, f"down_{level}_{i}", attends[level])
                skips.append(h)
            if level < last:
                h = downsample(h, level, downsampling[level])
                skips.append(h)

        h = block(h, last, "middle_0", self.middle_attention, residual_scale=self.middle_residual_scale)
        h = block(h, last, "middle_1", False, residual_scale=self.middle_residual_scale)

        for level in reversed(range(last + 1)):
            for i in range(res_blocks[level] + 1):
                skip = skips.pop() if self.skip_scale == 1 else self.skip_scale * skips.pop()
                h = block(h, level, f"up_{level}_{i}", attends[level], skip)
            if level > 0:
                h = upsample(h, level, upsampling[level - 1])

        h = GroupNorm(self.num_groups, self.norm_epsilon, outer_activation, name="norm_out")(h)
        out_channels *= 2 if self.learned_variance else 1
        h = Conv(out_channels, init_scale=0.0, dtype=self.dtype, name="conv_out")(h)
        return h.astype(jnp.float32)

    @property
    def widths(self) -> list[int]:
        """Channels of each level, from the full size down."""
        return list(self.level_channels or [self.channels * factor for factor in self.channel_multipliers])

    @property
    def res_blocks(self) -> list[int]:
        """Residual blocks of each level in the encoder, from the full size down."""
        return list(self.level_res_blocks or [self.num_res_blocks] * len(self.widths))

    def levels_with_attention(self, height: int, width: int) -> list[bool]:
        """Whether each level, from the full size down, has attention on images of this size."""
        if self.attention_levels is not None:
            return list(self.attention_levels)
        longer_side = max(height, width)
        return [longer_side >> level in self.attention_resolutions for level in range(len(self.widths))]

    def _check(self, x: jax.Array, t: jax.Array, cond: Mapping[str, jax.Array]) -> None:
        for name, value, accepted in (
            ("downsample", self.downsample, DOWNSAMPLING),
            ("downsample_padding", self.downsample_padding, DOWNSAMPLE_PADDING),
            *(("downsample_levels", method, DOWNSAMPLING) for method in self.downsample_levels or ()),
            ("upsample", self.upsample, UPSAMPLING),
            *(("upsample_levels", method, UPSAMPLING) for method in self.upsample_levels or ()),
            ("activation", self.activation, tuple(ACTIVATIONS)),
            ("outer_activation", self.outer_activation, tuple(ACTIVATIONS)),
            *(("time_activations", name, tuple(ACTIVATIONS)) for name in self.time_activations),
            ("cross_attention", self.cross_attention, CROSS_ATTENTION),
            ("vector_embedding", self.vector_embedding, VECTOR_EMBEDDINGS),
            ("time_embedding", self.time_embedding, TIME_EMBEDDINGS),
            ("remat", self.remat, REMAT),
        ):
            if value not in accepted:
                raise ValueError(f"{name} is {value!r}; accepted: {', '.join(accepted)}")
        levels = len(self.widths)
        for name, methods in (("downsample_levels", self.downsample_levels), ("upsample_levels", self.upsample_levels)):
            if methods is not None and len(methods) != levels - 1:
                raise ValueError(f"{name} has {len(methods)} entries for {levels - 1} halvings of the size")
        if self.attention_levels is not None and len(self.attention_levels) != levels:
            raise ValueError(f"attention_levels has {len(self.attention_levels)} entries for {levels} levels")
        if len(self.res_blocks) != levels or min(self.level_res_blocks or [1]) < 1:
            raise ValueError(f"level_res_blocks is {tuple(self.res_blocks)}; accepted: 1 or more for {levels} levels")
        for name in ("residual_scale", "middle_residual_scale", "skip_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: above 0")
        if x.ndim != 4:
            raise ValueError(f"x has shape {x.shape}; accepted: [B, H, W, C]")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t has shape {t.shape}; accepted: {x.shape[:1]}, one entry per image")
        factor = 2 ** (levels - 1)
        rounds_up = self.downsample == "conv" and self.downsample_padding == "symmetric" and self.upsample == "nearest"
        rounds_up &= not (self.downsample_levels or self.upsample_levels)
        if not rounds_up and (x.shape[1] % factor or x.shape[2] % factor):
            raise ValueError(
                f"an image of {x.shape[1]}x{x.shape[2]} cannot be halved {levels - 1} times: "
                f"with {levels} levels height and width must be divisible by {factor}"
            )
        if self.time_embedding == "learned" and not jnp.issubdtype(t.dtype, jnp.integer):
            raise ValueError(f"t is {t.dtype}, but the network's time embedding is learned; accepted: integers")
        unknown = [name for name in cond if name not in CONDITIONING]
        if unknown:
            raise ValueError(f"cond has {unknown[0]!r}; accepted: {', '.join(CONDITIONING)}")
        if self.transformer_depth and "tokens" not in cond:
            raise ValueError("cond has no 'tokens', which transformer_depth above 0 needs")
        for name in ("token_channels", "pooling_heads"):
            if getattr(self, name) and "tokens" not in cond:
                raise ValueError(f"cond has no 'tokens', which {name} {getattr(self, name)} needs")
        if self.cross_attention != "separate" and "tokens" not in cond:
            raise ValueError(f"cond has no 'tokens', which cross_attention {self.cross_attention!r} needs")
        if self.cross_attention != "separate" and self.transformer_depth:
            raise ValueError(
                f"cross_attention is {self.cross_attention!r}; accepted with a transformer_depth: 'separate'"
            )
        if self.context_groups and self.cross_attention == "separate":
            raise ValueError(f"context_groups is {self.context_groups}; accepted with cross_attention 'separate': 0")
        if "level" in cond and cond["level"].shape != x.shape[:1]:
            raise ValueError(f"cond['level'] has shape {cond['level'].shape}; accepted: {x.shape[:1]}")
        if self.transformer_depth and self.attention_patch_size > 1:
            raise ValueError(
                f"attention_patch_size is {self.attention_patch_size}; accepted with a transformer_depth: 1"
            )
        if self.transformer_depth and self.middle_attention_groups is not None:
            raise ValueError(
                f"middle_attention_groups is {self.middle_attention_groups}; accepted with a transformer_depth: None"
            )
        time_channels = self.time_channels or 4 * self.channels
        if "vector" in cond and self.vector_embedding == "none" and cond["vector"].shape[-1] != time_channels:
            raise ValueError(f"cond['vector'] has {cond['vector'].shape[-1]} channels; accepted: {time_channels}")
        if "label" in cond and self.num_classes is None:
            raise ValueError("cond has 'label', but the network has no classes (num_classes is None)")
        if self.num_classes is not None and not (self.null_class or "label" in cond or self.is_initializing()):
            raise ValueError("cond has no 'label', but the network has no null class; name a class for every image")
