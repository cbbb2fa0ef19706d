"""The training loss: the weighted squared error of a prediction, the variational bound's term, or both."""

from functools import partial

import jax
import jax.numpy as jnp

from ddpm_jax.diffusion.bound import mean_flat, vb_term_bpd
from ddpm_jax.diffusion.gaussian import (
    PREDICTIONS,
    ModelFn,
    check_option,
    convert_prediction,
    normal,
    q_sample,
    split_output,
)
from ddpm_jax.diffusion.schedules import Schedule, extract
from ddpm_jax.diffusion.shapes import Images, Keys, PerExample, Timesteps
from ddpm_jax.diffusion.timesteps import sample_timesteps

LOSSES = ("simple", "hybrid", "vlb")
WEIGHTINGS = ("none", "min_snr", "p2", "truncated_snr")


def loss_weight(schedule: Schedule, t: Timesteps, prediction: str, weighting: str) -> PerExample:
    """The weights [B] of the squared error of the given prediction.

    "none": 1. The others are defined for the error of x_0 and converted, with snr = abar_t / (1 - abar_t):

        min_snr          min(snr, 5)                   (Hang et al. 2023, gamma = 5)
        p2               snr / (1 + snr)               (Choi et al. 2022, k = gamma = 1)
        truncated_snr    max(snr, 1)                   (Salimans & Ho 2022)
    """
    check_option("prediction", prediction, PREDICTIONS)
    check_option("weighting", weighting, WEIGHTINGS)
    if weighting == "none":
        return jnp.ones(t.shape)
    snr = jnp.exp(extract(schedule.log_snr, t, 1))
    # |eps error|^2 = snr |x_0 error|^2 and |v error|^2 = (1 + snr) |x_0 error|^2; no 0 / 0 where x_t is pure noise.
    if prediction == "eps":
        return {
            "min_snr": jnp.minimum(1.0, 5.0 / snr),
            "p2": 1.0 / (1.0 + snr),
            "truncated_snr": jnp.maximum(1.0, 1.0 / snr),
        }[weighting]
    weight = {
        "min_snr": jnp.minimum(snr, 5.0),
        "p2": snr / (1.0 + snr),
        "truncated_snr": jnp.maximum(snr, 1.0),
    }[weighting]
    return weight / (1.0 + snr) if prediction == "v" else weight


def training_loss(
    schedule: Schedule,
    model_fn: ModelFn,
    key: Keys | None,
    x_0: Images,
    *,
    t: Timesteps | None = None,
    noise: Images | None = None,
    prediction: str = "eps",
    variance: str = "fixed_large",
    loss: str = "simple",
    weighting: str = "none",
    vlb_weight: float = 1e-3,
) -> PerExample:
    """The per-example loss (DDPM, algorithm 1 and eq. 14; Improved DDPM, eq. 16).

    Args:
      schedule: T timesteps.
      model_fn: (x_t, t) -> output.
      key: typed key for t and the noise; may be None if both are given.
      x_0: [B, H, W, C] in [-1, 1].
      t: int32 [B]; None: drawn uniformly.
      noise: like x_0; None: drawn.
      prediction: what the network is trained to predict: "eps", "x_0" or "v".
      variance: as in `p_mean_variance`; "learned" needs twice the output channels.
      loss: "simple", the weighted mean squared error of the prediction; "vlb", T times the bound's term at t, in
        bits/dim; "hybrid", the simple loss plus vlb_weight times T times the bound's term, whose gradient here only
        trains the variance.
      weighting: see `loss_weight`; for the squared error only.
      vlb_weight: the hybrid loss's lambda.

    Returns:
      float32 [B].

    Raises:
      ValueError: an unknown option, or a hybrid loss without learned variance.
    """
    check_option("loss", loss, LOSSES)
    check_option("prediction", prediction, PREDICTIONS)
    if loss == "hybrid" and variance != "learned":
        raise ValueError(f"loss 'hybrid' trains a learned variance; variance is {variance!r}")
    if loss == "simple" and variance == "learned":
        raise ValueError("loss 'simple' does not train a learned variance; use 'hybrid' or 'vlb'")
    if t is None or noise is None:
        if key is None:
            raise ValueError("training_loss needs a key to draw t or noise; key may be None only if both are given")
        t_key, noise_key = jax.random.split(key)
        t = sample_timesteps(t_key, x_0.shape[0], schedule.num_timesteps)[0] if t is None else t
        noise = normal(noise_key, x_0.shape, x_0.dtype) if noise is None else noise
    x_t = q_sample(schedule, x_0, t, noise)
    model_output = model_fn(x_t, t)

    bound = partial(vb_term_bpd, schedule, x_0=x_0, x_t=x_t, t=t, prediction=prediction, variance=variance)
    if loss == "vlb":
        return schedule.num_timesteps * bound(model_output)
    output, interpolation = split_output(model_output, variance)
    target = noise if prediction == "eps" else convert_prediction(schedule, x_0, x_t, t, "x_0", prediction)
    if output.shape != target.shape:
        raise ValueError(f"the network's output has shape {output.shape}, but the images have shape {target.shape}")
    value = loss_weight(schedule, t, prediction, weighting) * mean_flat((output - target) ** 2)
    if interpolation is not None:
        frozen = jnp.concatenate([jax.lax.stop_gradient(output), interpolation], axis=-1)
        value += vlb_weight * schedule.num_timesteps * bound(frozen)
    return value
