"""Initial weights from another run and, if it is adapted too, from a text encoder."""

from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ddpm_jax.config import TRAINED, make_betas_from
from ddpm_jax.run import open_run
from ddpm_jax.runtime import parallel, workdir
from ddpm_jax.runtime.checkpoints import Checkpoints
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.training.state import Params
from ddpm_jax.training.texts import read_text_encoder

# Fields that change the meaning of weights but not their shapes.
_SAME_SHAPES = (
    ("model", "num_heads"),
    ("model", "head_channels"),
    ("model", "num_groups"),
    ("model", "middle_attention_groups"),
    ("model", "norm_epsilon"),
    ("model", "activation"),
    ("model", "residual_scale"),
    ("model", "middle_residual_scale"),
    ("model", "skip_scale"),
    ("model", "time_frequency_shift"),
    ("model", "time_cosines_first"),
    ("model", "downsample"),
    ("model", "downsample_padding"),
    ("model", "downsample_levels"),
    ("model", "upsample_levels"),
    ("model", "center_input"),
    ("text", "num_heads"),
    ("diffusion", "prediction"),
)


def start_weights(config: ConfigDict, wanted: Params) -> tuple[int, Params]:
    """The initial weights of a run: those of config.train.init_from and, if the text encoder is adapted too, those of
    config.text.encoder.

    Args:
      config: of the new run.
      wanted: the shapes of its weights.

    Returns:
      The step of config.train.init_from, and the weights.

    Raises:
      UserError: there is no run, or its network has other shapes or means something else.
    """
    name = config.train.init_from
    try:
        run = open_run(name)
    except UserError as error:
        raise UserError(f"--init_from {name!r}: {error}") from None
    if run.config.lora.text_encoder:
        raise UserError(
            f"--init_from {name!r} adapted its text encoder (lora.text_encoder), which cannot be taken over; "
            "accepted: that run exported with --mode=export and imported again with --mode=import"
        )
    for section, field in _SAME_SHAPES:
        if section == "text" and config.text.encoder != TRAINED:  # these weights hold no text encoder
            continue
        theirs, ours = run.config[section][field], config[section][field]
        if theirs != ours:
            raise UserError(
                f"--init_from {name!r} has {section}.{field} {theirs!r}, but this config has {ours!r}; the weights "
                "would be used with a different meaning"
            )
    theirs, ours = run.schedule.num_timesteps, len(make_betas_from(config))
    if theirs != ours:
        raise UserError(
            f"--init_from {name!r} has {theirs} timesteps, but this config has {ours}, so the same t would mean a "
            "different noise level"
        )
    params = run.params
    if config.lora.text_encoder:
        params = {"net": params, "encoder": read_text_encoder(config.text.encoder)[1]}
    found = jax.tree_util.tree_flatten_with_path(params)[0]
    shapes = dict(jax.tree_util.tree_flatten_with_path(wanted)[0])
    for path, value in found:
        expected = shapes.pop(path, None)
        if expected is None or value.shape != expected.shape:
            raise UserError(
                f"--init_from {name!r} has {jax.tree_util.keystr(path, simple=True, separator='/')} of shape "
                f"{value.shape}; this config's network has {'none' if expected is None else expected.shape}"
            )
    if shapes:
        path = next(iter(shapes))
        raise UserError(
            f"--init_from {name!r} has no {jax.tree_util.keystr(path, simple=True, separator='/')}, "
            "which this config's network has"
        )
    return run.step, params


def base_weights(config: ConfigDict, folder: Path, shapes: Params, mesh: Mesh, say: Callable[[str], None]) -> Params:
    """The weights of a network whose adapters are trained: those in the workdir or, at first, those of `start_weights`.

    Args:
      config: of the run that trains them.
      folder: its workdir.
      shapes: of the weights.
      mesh: of the training.
      say: told the step of the weights that it starts from.
    """
    shardings = parallel.state_shardings(mesh, shapes)
    base = Checkpoints(folder / workdir.BASE)
    try:
        if base.steps():
            return base.restore_weights(None, "params", parallel.laid(shapes, shardings))[1]
        step, weights = start_weights(config, shapes)
        say(f"adapting the weights of {config.train.init_from}, step {step}")
        params = jax.device_put(weights, shardings)
        base.save_weights(step, params)
        return params
    finally:
        base.close()
