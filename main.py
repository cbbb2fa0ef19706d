"""Denoising Diffusion Probabilistic Models in JAX: trains a run, samples from it, exchanges weights.

Train, or go on from the last checkpoint:
  python main.py --config=configs/digits.py --workdir=runs/digits
  python main.py --config=configs/cifar10.py --workdir=runs/cifar10 --config.train.batch_size=64

Sample from a workdir; the config lies in it:
  python main.py --mode=sample --workdir=runs/digits --num_images=256 --seed=1 --output=png

Make a workdir of other people's weights, or a folder for diffusers of a workdir:
  python main.py --mode=import --source=google/ddpm-cifar10-32 --workdir=runs/imported
  python main.py --mode=export --workdir=runs/digits --out=digits-diffusers
"""

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

FLAGS = flags.FLAGS
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File with the config; any field can be set with --config.section.field=value.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_MODE = flags.DEFINE_enum("mode", "train", ["train", "sample", "import", "export"], "What to do.")

_INIT_FROM = flags.DEFINE_string("init_from", None, "train: start from the averaged weights of this workdir.")
_SOURCE = flags.DEFINE_string(
    "source", None, "import: a diffusers folder, its name on the Hugging Face hub, or an exported .safetensors file."
)

_NUM_IMAGES = flags.DEFINE_integer("num_images", None, "sample: how many images; by default the config's.")
_SEED = flags.DEFINE_integer("seed", 0, "sample: image i depends on the seed and i alone.")
_NUM_STEPS = flags.DEFINE_integer("num_steps", None, "sample: network calls an image; by default the config's.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "sample: images at a time; by default the config's.")
_STEP = flags.DEFINE_integer("step", None, "sample, export: of the checkpoint; by default the newest.")
_EMA_DECAY = flags.DEFINE_float(
    "ema_decay", None, "sample, export: which moving average; by default the config's first."
)
_RAW = flags.DEFINE_bool("raw", False, "sample, export: the weights as trained instead of a moving average.")
_CLASSES = flags.DEFINE_list("classes", [], "sample: of a class-conditional run, repeated for all images: 0,1,2.")
_OUTPUT = flags.DEFINE_enum("output", "grid", ["grid", "png", "npz"], "sample: one picture, many, or an array.")
_OUT = flags.DEFINE_string(
    "out",
    None,
    "sample: where to write; by default WORKDIR/samples/step_..._seed_...; "
    "export: the folder for diffusers, or a .safetensors file of the parameters by their names here.",
)

_COORDINATOR = flags.DEFINE_string("coordinator", "", "Several hosts: host:port of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "Several hosts: how many processes.")
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "Several hosts: which of them this is, from 0.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Several hosts: learn all that from the TPU pod or from Slurm.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}; every option starts with --")
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a save at INFO
    # Imported here so that --help and a misspelt flag are answered at once.
    from ddpm_jax import parallel
    from ddpm_jax.errors import UserError

    try:
        parallel.keep_freed_memory()
        parallel.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _DISTRIBUTED.value)
        {"train": train, "sample": sample, "import": import_weights, "export": export_weights}[_MODE.value]()
    except UserError as error:
        sys.exit(f"error: {error}")


def train() -> None:
    from ddpm_jax import workdir
    from ddpm_jax.training.loop import train

    config = _CONFIG.value if _CONFIG.value is not None else workdir.read_config(_WORKDIR.value)
    if _INIT_FROM.value is not None:
        config.train.init_from = _INIT_FROM.value
    train(config, _WORKDIR.value)


def sample() -> None:
    from ddpm_jax import command_line
    from ddpm_jax.run import load

    run = load(_WORKDIR.value, _STEP.value, _EMA_DECAY.value, _RAW.value)
    command_line.sample(
        run,
        _WORKDIR.value,
        num_images=_NUM_IMAGES.value,
        seed=_SEED.value,
        num_steps=_NUM_STEPS.value,
        batch_size=_BATCH_SIZE.value,
        classes=_CLASSES.value,
        output=_OUTPUT.value,
        out=_OUT.value,
    )


def import_weights() -> None:
    from ddpm_jax import command_line

    command_line.import_weights(_SOURCE.value, _WORKDIR.value)


def export_weights() -> None:
    from ddpm_jax import command_line
    from ddpm_jax.run import load

    run = load(_WORKDIR.value, _STEP.value, _EMA_DECAY.value, _RAW.value)
    command_line.export_weights(run, _OUT.value)


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with one sentence for a config file that is not there and for a field that does not exist."""
    for name, _, value in (argument.lstrip("-").partition("=") for argument in argv[1:]):
        if name == "config" and value and not Path(value).is_file():
            there = ", ".join(path.name for path in sorted(Path(__file__).parent.glob("configs/[!_]*.py")))
            sys.exit(f"error: --config is {value!r}, which is not a file; configs/ has {there}")
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError):
        from ddpm_jax.config import default_config, fields
        from ddpm_jax.errors import nearest

        known = dict(fields(default_config()))
        for argument in argv[1:]:
            prefix, dot, field = argument.lstrip("-").partition("=")[0].partition(".")
            if prefix == "config" and dot and field not in known:
                sys.exit(f"error: config field {field!r} does not exist.{nearest(field, known)}")
        raise


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
