"""Training objectives: the loss of a batch's examples. The step, the loop and the plans work with any of them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax.data.source import Source
from ddpm_jax.diffusion.gaussian import normal
from ddpm_jax.diffusion.losses import training_loss
from ddpm_jax.diffusion.timesteps import LossHistory, sample_timesteps
from ddpm_jax.interop.transformers import CLIP
from ddpm_jax.models import lora
from ddpm_jax.models.autoencoder import Autoencoder
from ddpm_jax.models.clip import CLIPImageEncoder, CLIPTextEncoder
from ddpm_jax.runtime.rng import named_key
from ddpm_jax.sampling.captions import CaptionCondition
from ddpm_jax.sampling.decoder import Pixels
from ddpm_jax.sampling.generate import Model

Params = Any
Batch = Mapping[str, jax.Array]
Examples = dict[str, Any]
Key = Callable[[str], jax.Array]


class Objective(Protocol):
    """A training objective.

    Attributes:
      reads: the entries of a training batch that it needs, without the batch axis.
      num_timesteps: T if its examples have timesteps, else None.
    """

    @property
    def reads(self) -> Mapping[str, jax.ShapeDtypeStruct]: ...

    @property
    def num_timesteps(self) -> int | None: ...

    def init_params(self, seed: int) -> Params:
        """The random initial parameters of a run with this seed."""
        ...

    def frozen_shapes(self) -> Params:
        """The shapes of `TrainState.frozen`, parameters that are read and not trained, or None."""
        ...

    def read(self, batch: Mapping[str, Any], source: Source, draws: np.ndarray) -> dict[str, Any]:
        """The entries named in `reads`, from a batch of `host_batches` of the source, on the host; see
        `Condition.read`."""
        ...

    def examples(self, batch: Batch, key: Key, history: LossHistory | None) -> Examples:
        """All random draws for a batch, as a function of the step's keys: arrays [B, ...] including "weight", the
        weight of each loss, and "t" int32 if there are timesteps. The examples are sharded over the devices."""
        ...

    def losses(self, params: Params, frozen: Params, examples: Examples, key: jax.Array) -> jax.Array:
        """The loss [B] of each example; `frozen` is `TrainState.frozen`, and `key` is for dropout."""
        ...


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """Training to predict the noise (DDPM, algorithm 1), or x_0 or v according to `loss_options`.

    From examples whose condition is dropped, the network learns the unconditional model that guidance needs (Ho &
    Salimans 2022, algorithm 1).

    Attributes:
      model: the model to train.
      timestep_sampler: see `sample_timesteps`.
      loss_options: of `training_loss`.
      lora_rank: if above 0, adapters of this rank are trained and the network's own parameters are frozen.
      lora_scale: of the adapters, see `lora.merge`.
    """

    model: Model
    timestep_sampler: str = "uniform"
    loss_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lora_rank: int = 0
    lora_scale: float = 1.0

    @property
    def reads(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        given = self.model.given
        return {**self.model.decoder.reads, **self.model.condition.reads, **(given.reads if given else {})}

    @property
    def num_timesteps(self) -> int:
        return self.model.schedule.num_timesteps

    def init_params(self, seed: int) -> Params:
        if not self.lora_rank:
            return self.model.init_params(seed)
        return lora.init(self.model.param_shapes(), self.lora_rank, named_key(seed, "lora"))

    def frozen_shapes(self) -> Params:
        return self.model.param_shapes() if self.lora_rank else None

    def read(self, batch: Mapping[str, Any], source: Source, draws: np.ndarray) -> dict[str, Any]:
        condition, given = self.model.condition, self.model.given
        read = condition.read(batch, source, draws)
        found = self.model.decoder.read(batch) | {name: read[name] for name in condition.reads}
        return found | ({name: given.of_examples(batch) for name in given.reads} if given else {})

    def examples(self, batch: Batch, key: Key, history: LossHistory | None) -> Examples:
        model = self.model
        x_0, cond = model.decoder.of_batch(batch, key), model.condition.of_training(batch, key)
        if model.given:
            cond = {**(cond or {}), **model.given.of_training(batch, key)}
        t, weights = sample_timesteps(key("t"), x_0.shape[0], self.num_timesteps, self.timestep_sampler, history)
        return {"x_0": x_0, "cond": cond, "t": t, "weight": weights, "noise": normal(key("noise"), x_0.shape)}

    def losses(self, params: Params, frozen: Params, examples: Examples, key: jax.Array) -> jax.Array:
        if self.lora_rank:
            params = lora.merge(frozen, params, self.lora_scale)

        def model_fn(x_t: jax.Array, t: jax.Array) -> Any:
            net = self.model.net
            return net.apply({"params": params}, x_t, t, examples["cond"], train=True, rngs={"dropout": key})

        x_0, t, noise = (examples[name] for name in ("x_0", "t", "noise"))
        return training_loss(self.model.schedule, model_fn, None, x_0, t=t, noise=noise, **self.loss_options)


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Training an autoencoder to reconstruct pictures from draws of its posterior (Kingma & Welling 2014; Rombach et
    al. 2022).

    The loss of a picture is the mean absolute error of its pixels plus `kl_weight` times the Kullback-Leibler
    divergence of the posterior from a standard normal distribution, averaged over the latents. The perceptual and the
    adversarial terms of Stable Diffusion's autoencoder need networks trained elsewhere and are left out.

    Attributes:
      autoencoder: the autoencoder to train.
      pixels: the pictures.
      kl_weight: weight of the divergence.
    """

    autoencoder: Autoencoder
    pixels: Pixels
    kl_weight: float
    num_timesteps: None = None

    @property
    def reads(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        return self.pixels.reads

    def init_params(self, seed: int) -> Params:
        example = jnp.zeros((1, *self.pixels.picture_shape))
        return self.autoencoder.init(named_key(seed, "init"), example)["params"]

    def frozen_shapes(self) -> Params:
        return None

    def read(self, batch: Mapping[str, Any], source: Source, draws: np.ndarray) -> dict[str, Any]:
        return self.pixels.read(batch)

    def examples(self, batch: Batch, key: Key, history: LossHistory | None) -> Examples:
        x = self.pixels.of_batch(batch, key)
        factor = self.autoencoder.downscaling
        latents = (len(x), x.shape[1] // factor, x.shape[2] // factor, self.autoencoder.latent_channels)
        return {"x": x, "noise": normal(key("noise"), latents), "weight": jnp.ones(len(x))}

    def losses(self, params: Params, frozen: Params, examples: Examples, key: jax.Array) -> jax.Array:
        def run(method: str, x: jax.Array) -> Any:
            return self.autoencoder.apply({"params": params}, x, method=method)

        x = examples["x"]
        mean, log_variance = run("encode", x)
        found = run("decode", mean + jnp.exp(0.5 * log_variance) * examples["noise"])
        axes = tuple(range(1, x.ndim))
        divergence = 0.5 * jnp.mean(mean**2 + jnp.exp(log_variance) - 1.0 - log_variance, axis=axes)
        return jnp.mean(jnp.abs(found - x), axis=axes) + self.kl_weight * divergence


@dataclasses.dataclass(frozen=True)
class Contrastive:
    """CLIP's training: matching the pictures of a batch with their captions (Radford et al. 2021, arXiv:2103.00020,
    figure 3).

    The logits of a batch are the cosine similarities between the embeddings of its pictures and captions, times a
    learned scale. The loss is the mean of two cross-entropies, one over the captions given a picture and one over the
    pictures given a caption. Both are over the whole batch, whatever the number of devices.

    Several pictures in a batch may share a caption. Then each of them is a correct match: the target of the
    cross-entropy is spread evenly over all pairs whose captions have the same tokens. So a data set may have fewer
    captions than a batch has pictures. If all captions differ, this is CLIP's own loss.

    Attributes:
      text, image: the encoders, with projections of the same width.
      condition: how the captions of a batch are read.
      pixels: the pictures.
    """

    text: CLIPTextEncoder
    image: CLIPImageEncoder
    condition: CaptionCondition
    pixels: Pixels
    num_timesteps: None = None

    @property
    def reads(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        return {**self.pixels.reads, "ids": self.condition.reads["ids"]}

    def init_params(self, seed: int) -> Params:
        ids, pictures = jnp.zeros((1, self.text.max_length), jnp.int32), jnp.zeros((1, *self.pixels.picture_shape))
        return {
            "text": self.text.init(named_key(seed, "init_text"), ids)["params"],
            "image": self.image.init(named_key(seed, "init"), pictures)["params"],
            "logit_scale": jnp.log(1 / 0.07),
        }

    def frozen_shapes(self) -> Params:
        return None

    def read(self, batch: Mapping[str, Any], source: Source, draws: np.ndarray) -> dict[str, Any]:
        return self.pixels.read(batch) | {"ids": self.condition.read(batch, source, draws)["ids"]}

    def examples(self, batch: Batch, key: Key, history: LossHistory | None) -> Examples:
        x = self.pixels.of_batch(batch, key)
        return {"x": x, "ids": batch["ids"], "weight": jnp.ones(len(x))}

    def losses(self, params: Params, frozen: Params, examples: Examples, key: jax.Array) -> jax.Array:
        ids = examples["ids"]
        pictures: Any = self.image.apply({"params": params["image"]}, examples["x"])
        texts: Any = self.text.apply({"params": params["text"]}, ids)
        equal = jnp.all(ids[:, None] == ids, axis=-1)
        return contrastive_losses(pictures.projected, texts.projected, clipped(params["logit_scale"]), equal)

    def clip_of(self, params: Params) -> CLIP:
        """The CLIP with these parameters."""
        half = (0.5,) * self.pixels.picture_shape[-1]  # pixels are from -1 to 1
        encoders = {"text": params["text"], "image": params["image"]}
        scale = min(float(params["logit_scale"]), _MOST_LOGIT_SCALE)
        return CLIP(self.text, self.image, encoders, scale, self.condition.texts.tokenizer, half, half)


_MOST_LOGIT_SCALE = float(np.log(100))


def contrastive_losses(pictures: jax.Array, texts: jax.Array, logit_scale: jax.Array, equal: jax.Array) -> jax.Array:
    """The losses [B] of pictures and their captions, whose mean is CLIP's loss; see `Contrastive`.

    Args:
      pictures, texts: embeddings [B, P].
      logit_scale: the logarithm of the factor of the cosine similarities.
      equal: bool [B, B], which captions are the same.
    """
    pictures, texts = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (pictures, texts))
    logits = jnp.exp(logit_scale) * jnp.matmul(pictures, texts.T, precision=jax.lax.Precision.HIGHEST)
    target = equal / jnp.sum(equal, axis=-1, keepdims=True)  # for both directions, since `equal` is symmetric
    of_pictures, of_texts = (-jnp.sum(target * jax.nn.log_softmax(x), axis=-1) for x in (logits, logits.T))
    return 0.5 * (of_pictures + of_texts)


@jax.custom_vjp
def clipped(logit_scale: jax.Array) -> jax.Array:
    """The logit scale clipped to at most log(100), as in CLIP. Above that, only gradients that lower it pass."""
    return jnp.minimum(logit_scale, _MOST_LOGIT_SCALE)


def _clipped_gradient(logit_scale: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    return (jnp.where((logit_scale < _MOST_LOGIT_SCALE) | (gradient > 0), gradient, 0.0),)


clipped.defvjp(lambda logit_scale: (clipped(logit_scale), logit_scale), _clipped_gradient)


def make_objective(config: ConfigDict, dataset: Mapping[str, Any] | None = None) -> Objective:
    """The objective set in the config; `dataset` as in `ddpm_jax.config.make_condition`."""
    if config.train.objective == "autoencoder":
        pixels = config_lib.make_pixels(config)
        return Reconstruction(config_lib.make_autoencoder(config), pixels, config.autoencoder.kl_weight)
    if config.train.objective == "clip":
        return make_contrastive(config, dataset)
    model = config_lib.make_model(config, dataset)
    adapted = {"lora_rank": config.lora.rank, "lora_scale": config_lib.lora_scale(config)} if config.lora.rank else {}
    return Diffusion(model, config.diffusion.timestep_sampler, config_lib.loss_options(config), **adapted)


def make_contrastive(config: ConfigDict, dataset: Mapping[str, Any] | None = None) -> Contrastive:
    """The CLIP that a run with train.objective "clip" trains; `dataset` as in `ddpm_jax.config.make_condition`."""
    condition = config_lib.make_condition(config, dataset)
    assert isinstance(condition, CaptionCondition)
    text, image = config_lib.make_clip_encoders(config, dataset)
    return Contrastive(text, image, condition, config_lib.make_pixels(config))
