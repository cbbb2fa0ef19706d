"""The command line: its flags, their parser, and `main`, which `main.py` and `python -m ddpm_jax` call."""

import importlib.util
import math
import re
import sys
from collections.abc import Callable
from logging import Formatter, LogRecord
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from ddpm_jax import usage
from ddpm_jax.runtime import memory

FLAGS = flags.FLAGS


class _PerStage(flags.ArgumentParser):
    """A number, or a list such as 2,1 with one number for each stage of a pipeline."""

    def __init__(self, kind: Callable[[str], Any], least: float):
        self._kind, self._least = kind, least

    def parse(self, argument: Any) -> Any:
        values = [self._kind(part) for part in str(argument).split(",")]
        if min(values) < self._least:
            raise ValueError(f"must be {self._least} or more")
        return values if len(values) > 1 else values[0]


def _define_per_stage(name: str, kind: Callable[[str], Any], help: str, least: float = -math.inf) -> Any:
    return flags.DEFINE(_PerStage(kind, least), name, None, help, serializer=flags.ArgumentSerializer())


# The help of a mode shows its flags in the order of this file.
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "The config file; --config.SECTION.FIELD=VALUE sets a field, and ddpm_jax/config/defaults.py explains all fields.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "Folder of the run; optional for doctor and prepare, and for plan with --config."
)
_MODE = flags.DEFINE_enum(
    "mode", "train", list(usage.MODES), "What to do; --mode=sample --help lists the flags of that mode."
)

flags.DEFINE_string("init_from", None, "train: start from the averaged weights of the run in this workdir.")
flags.DEFINE_string(
    "source",
    None,
    "import: a diffusers folder, its name on the Hugging Face hub, an exported .safetensors file, or a single-file "
    "checkpoint of Stable Diffusion (.safetensors or .ckpt).",
)
flags.DEFINE_list("stages", [], "compose: the workdirs of the runs, in order.")
flags.DEFINE_string(
    "tokenizer",
    None,
    "import of a single-file checkpoint: a folder with CLIP's vocab.json and merges.txt; by default from the hub.",
)
flags.DEFINE_enum(
    "prediction", None, ["eps", "v"], "import of a single-file checkpoint: what the network predicts; required for 2.x."
)
flags.DEFINE_bool(
    "adapters", False, "export: only the adapters that the run trained (config.lora), as a LoRA file for diffusers."
)

# What to draw, and where to write it.
flags.DEFINE_list("input", [], "The pictures to edit: files, or data:17 for training image 17.")
flags.DEFINE_string("mask", None, "inpaint: a picture that is white where --input is to be repainted.")
flags.DEFINE_multi_string(
    "prompt", [], "Text-conditional run: what to draw; repeat the flag for more; a grid has one row per prompt."
)
flags.DEFINE_string("prompts", None, "A text file with one prompt on each line, used after those of --prompt.")
flags.DEFINE_multi_string(
    "negative_prompt", [], "What guidance steers away from; repeat the flag to give one for each prompt."
)
flags.DEFINE_list("classes", [], "Class-conditional run: what to draw, such as 0,1,2; a grid has one row per class.")
flags.DEFINE_string("caption", None, "text_difference: describes the picture.")
flags.DEFINE_string("target_caption", None, "text_difference: describes what the picture becomes.")
flags.DEFINE_list("t", [], "interpolate, vary, denoise, coarse_to_fine: the timesteps to diffuse the pictures to.")
flags.DEFINE_float(
    "strength",
    None,
    "vary: instead of --t, the share of the sampling steps to take, as in diffusers; above 0, at most 1.",
)
flags.DEFINE_list("weights", [], "interpolate, blend, text_difference: weights of the second picture or caption.")
flags.DEFINE_bool(
    "latents", False, "interpolate: encode both pictures to noise with DDIM, and follow the arc between the two noises."
)
flags.DEFINE_integer("jump", None, "inpaint: length of RePaint's jumps back, in steps; by default 10.", lower_bound=1)
flags.DEFINE_integer(
    "times",
    None,
    "inpaint: how many times RePaint runs the steps of each jump; by default 1, which repeats nothing.",
    lower_bound=1,
)
flags.DEFINE_integer("num_stages", None, "progressive: how many stages to show; by default 10.", lower_bound=2)
flags.DEFINE_enum("of", "x_0", ["x_0", "x"], "progressive: show the predicted x_0 or the noisy x_t.")
flags.DEFINE_integer("num_neighbours", 5, "neighbours: training images per sample.", lower_bound=1)
flags.DEFINE_integer(
    "num_images", None, "How many images; by default the config's, or 8 in each row of a grid.", lower_bound=1
)
flags.DEFINE_string(
    "images", None, "sample: write the images FIRST-LAST to .npz shards, such as 0-49999; shards that exist are kept."
)
flags.DEFINE_integer("shard_size", 1000, "With --images, and in evaluate: images in a shard.")
flags.DEFINE_string(
    "part", "0/1", "With --images: I/N, this process's share of the shards, 0/4 to 3/4 for four processes."
)
flags.DEFINE_enum(
    "output",
    "grid",
    ["grid", "png", "npz"],
    "sample: a grid in one PNG file, with small pictures enlarged; a folder of PNG files; or an array in a .npz file.",
)
flags.DEFINE_string(
    "out",
    None,
    "The file or folder to write; by default in WORKDIR/samples. export: a folder for diffusers, or a .safetensors "
    "file with this project's parameter names.",
)
flags.DEFINE_integer("height", None, "Height of the pictures; by default the config's.", lower_bound=1)
flags.DEFINE_integer("width", None, "Width of the pictures; by default the config's.", lower_bound=1)
flags.DEFINE_integer(
    "seed",
    0,
    "Seed of all noise: image i depends only on the seed, i and the settings.",
    lower_bound=0,
    upper_bound=2**32 - 1,
)
flags.DEFINE_integer(
    "batch_size",
    None,
    "Images at a time, by default the config's; serve: the most images of one request, by default 8.",
    lower_bound=1,
)

flags.DEFINE_string(
    "features",
    None,
    "evaluate: the network whose features are compared: digits, a small classifier; inception, FID's network, "
    "downloaded once; or a file with its weights.",
)
flags.DEFINE_string(
    "against",
    "data",
    "evaluate: the real images: data, the run's training set; a folder; a .npz or .npy file; or a reference file.",
)
flags.DEFINE_string(
    "generated", None, "evaluate: images to evaluate instead of samples: a folder, a .npz or .npy file, or shards."
)
flags.DEFINE_string(
    "likelihood",
    "estimate",
    "evaluate: bits/dim by an estimate of the bound, by the whole bound, by the probability flow, or none.",
)
flags.DEFINE_integer(
    "likelihood_images", 256, "evaluate: how many training images bits/dim is computed on.", lower_bound=2
)
flags.DEFINE_string(
    "clip_model",
    None,
    "evaluate: the workdir or transformers folder of a CLIP, for the CLIPScore of samples and prompts.",
)
flags.DEFINE_string(
    "save_reference",
    None,
    "evaluate: write the moments of the real images to this .npz file, a reference file for --against.",
)

flags.DEFINE_string(
    "topology", None, "plan: the TPU slice to compile for, such as v5e:2x4; by default measure on this machine."
)
flags.DEFINE_list(
    "programs", [], "plan: which of train, sample, decode (of latents) and evaluate; by default all that the run has."
)

flags.DEFINE_string(
    "host", "127.0.0.1", "serve: the address to listen on; the default is reachable from this machine only."
)
flags.DEFINE_integer("port", 8000, "serve: the port to listen on; 0: any free port.", lower_bound=0, upper_bound=65535)
flags.DEFINE_integer("queue", 16, "serve: how many requests may wait; further ones are refused.", lower_bound=0)

# How to sample.
flags.DEFINE_string("sampler", None, "Sampler: ddpm, ddim, dpmpp_2m, dpmpp_2m_sde, heun, unipc or plms.")
_define_per_stage(
    "num_steps", int, "The sampler's number of steps; for a pipeline, one number or one for each stage.", 1
)
flags.DEFINE_string(
    "spacing", None, "Spacing of the timesteps: linspace, leading, trailing, quadratic, logsnr or karras."
)
flags.DEFINE_list("timesteps", None, "The timesteps themselves, in descending order, instead of --num_steps.")
flags.DEFINE_float("eta", None, "Noise of the steps of ddim, from 0 (deterministic) to 1 (as much as ddpm).")
flags.DEFINE_bool("clip", None, "Clip the predicted x_0 to [-1, 1].")
flags.DEFINE_float("dynamic_threshold", None, "Quantile of the predicted x_0 for dynamic thresholding, such as 0.995.")
flags.DEFINE_integer("order", None, "Order of unipc: 1, 2 or 3.")
_define_per_stage(
    "guidance_scale",
    float,
    "Strength of classifier-free guidance towards the prompt or class; 1: none. For a pipeline, one number or one for "
    "each stage.",
)
flags.DEFINE_float("guidance_rescale", None, "How far to undo the contrast that guidance adds, 0 to 1.")
flags.DEFINE_list("guidance_interval", None, "LOWEST,HIGHEST: the timesteps at which guidance is on.")

# Which weights.
flags.DEFINE_integer("step", None, "Step of the checkpoint to open; by default the latest.")
flags.DEFINE_float(
    "ema_decay", None, "Which moving average of the weights to use, by its decay; by default the config's first."
)
flags.DEFINE_bool("raw", False, "Use the trained weights themselves instead of a moving average.")
flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Type of the weights in memory and the arithmetic; by default the config's."
)
flags.DEFINE_multi_string(
    "lora", [], "Stable Diffusion: a LoRA file to add, as FILE or FILE:WEIGHT (by default 1); repeat the flag for more."
)

_COORDINATOR = flags.DEFINE_string("coordinator", "", "Several hosts: host:port of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Several hosts: the number of processes.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Several hosts: the number of this process, from 0.", lower_bound=0
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Several hosts: take these three from the TPU pod, Slurm, Open MPI, Kubernetes, or JAX_COORDINATOR_ADDRESS, "
    "JAX_NUM_PROCESSES and JAX_PROCESS_ID.",
)
_START_TIMEOUT = flags.DEFINE_integer(
    "start_timeout", 300, "Several hosts: seconds within which all processes must have joined.", lower_bound=1
)
_SILENCE_TIMEOUT = flags.DEFINE_integer(
    "silence_timeout",
    60,
    "Several hosts: seconds after which a silent process counts as lost, and all stop.",
    lower_bound=1,
)
_COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "Folder that keeps compiled programs for the next start; by default in the user's cache; off: none.",
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unknown argument {argv[1]!r}; every flag starts with --")
    if not _WORKDIR.value and _MODE.value not in ("doctor", "prepare", "plan" if _CONFIG.value is not None else ""):
        sys.exit(f"error: --mode={_MODE.value} needs --workdir: the folder of the run")
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
        logging.get_absl_handler().setFormatter(_Plain())
        hush_checkpoints()
    # Imported here so that --help and a misspelt flag get an answer at once.
    from ddpm_jax import modes
    from ddpm_jax.runtime import parallel, processes
    from ddpm_jax.runtime.errors import UserError

    try:
        parallel.keep_compiled_programs(_COMPILATION_CACHE.value)
        with processes.job(
            _COORDINATOR.value,
            _NUM_PROCESSES.value,
            _PROCESS_ID.value,
            automatic=_DISTRIBUTED.value,
            start_timeout=_START_TIMEOUT.value,
            silence_timeout=_SILENCE_TIMEOUT.value,
            advice=advice,
        ):
            modes.run(_MODE.value)
    except UserError as error:
        sys.exit(f"error: {error}")


class _Plain(Formatter):
    """Log messages such as "warning: ...", without the thread and the source line."""

    def formatMessage(self, record: LogRecord) -> str:  # noqa: N802, the base class's name
        return f"{record.levelname.lower()}: {record.message}"


def hush_checkpoints() -> None:
    """Silences what Orbax, asyncio and TensorStore log of a failed save, which is raised as one sentence.

    Orbax logs a traceback, and asyncio and TensorStore another for every array.
    """
    logging.get_absl_handler().addFilter(lambda record: not {"orbax", "asyncio"} & {*Path(record.pathname).parts})

    def report(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = report


def advice() -> str:
    """What to do after a multi-host job stopped with an error."""
    again = "start the same command on every host again"
    if _MODE.value != "train":
        return again
    from ddpm_jax.runtime.checkpoints import newest_step

    step = newest_step(Path(_WORKDIR.value).expanduser())
    return f"{again}: " + ("it starts over" if step is None else f"it resumes from the checkpoint of step {step}")


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with one sentence for an unknown flag, value, config file or config field.

    A --config that names no file is looked up among the configs of the package. --help exits with status 0.
    """
    from ddpm_jax.runtime.errors import UserError

    if len(argv) == 1:
        print(usage.introduction(), end="")
        sys.exit(0)
    is_help = [argument.lstrip("-") in ("h", "help", "helpshort") for argument in argv]
    asked_for = zip(argv, is_help, strict=True)
    argv = [_with_config_found(argument) for argument, ignored in asked_for if not ignored]
    try:
        positional = FLAGS(argv)
        if any(is_help):
            chosen = FLAGS["mode"].present or _CONFIG.value is not None
            print(usage.of_mode(_MODE.value) if chosen else usage.overview(), end="")
            sys.exit(0)
        return positional
    except SystemExit as end:  # absl's status for help is 1
        asked = {argument.lstrip("-").partition("=")[0] for argument in argv[1:]}
        sys.exit(0 if asked & {"helpfull", "helpxml"} else end.code)
    except flags.UnrecognizedFlagError as error:
        sys.exit(f"error: {_unknown_flag(error.flagname)}")
    except flags.Error as error:
        sys.exit(f"error: {_illegal_value(error)}")
    except UserError as error:  # raised by a config file
        sys.exit(f"error: {error}")
    except (AttributeError, KeyError) as error:
        if "'get_config'" in str(error):
            sys.exit("error: the file of --config has no function get_config; configs/digits.py shows one")
        from ddpm_jax.config import FREE_FORM, default_config, fields
        from ddpm_jax.runtime.errors import nearest

        known = dict(fields(default_config()))
        for argument in argv[1:]:
            prefix, dot, field = argument.lstrip("-").partition("=")[0].partition(".")
            for whole in FREE_FORM:
                if prefix == "config" and field.startswith(f"{whole}."):
                    rest = field.removeprefix(f"{whole}.")
                    sys.exit(f"error: config field {whole!r} is set as a whole: --config.{whole}='{{\"{rest}\": 0.5}}'")
            if prefix == "config" and dot and field not in known:
                sys.exit(f"error: config field {field!r} does not exist.{nearest(field, known)}")
        raise


def _unknown_flag(name: str) -> str:
    from ddpm_jax.runtime.errors import nearest

    prefix, dot, field = name.partition(".")
    if prefix == "config":
        return f"--{name} also needs --config, the config file whose field {field} it changes"
    known = [f"--{flag.name}" for flag in FLAGS.get_flags_for_module(__name__)]
    if dot:
        from ddpm_jax.config import default_config, fields

        known += [f"--config.{field}" for field, _ in fields(default_config())]
    return f"flag --{name} does not exist.{nearest(f'--{name}', known) or ' --help lists all.'}"


def _illegal_value(error: flags.Error) -> str:
    """absl's message about a flag's value as one sentence, with the nearest choice if there are choices."""
    from ddpm_jax.runtime.errors import nearest

    text = " ".join(str(error).split())
    found = re.fullmatch(r"flag --([\w.]+)=(.*?): (value should be one of <(.*)>|invalid literal.*|could not.*)", text)
    if not found:
        return text
    name, value, why, choices = found.groups()
    if choices is None:
        return f"--{name} is {value!r}; accepted: {'a whole number' if 'int()' in why else 'a number'}"
    return f"--{name} is {value!r}; accepted: {choices.replace('|', ', ')}.{nearest(value, choices.split('|'))}"


def _with_config_found(argument: str) -> str:
    name, _, value = argument.lstrip("-").partition("=")
    value, colon, told = value.partition(":")  # get_config is called with what follows the colon
    if name != "config" or not value or Path(value).is_file():
        return argument
    package = Path(__file__).parent
    folder = next(path for path in (package / "configs", package.parent / "configs") if path.is_dir())
    path = folder / f"{value.removeprefix('configs/').removesuffix('.py')}.py"
    there = {path.name: path for path in sorted(folder.glob("[!_]*.py")) if path.name != "common.py"}
    if path.name not in there or path != there[path.name]:
        sys.exit(f"error: --config is {value!r}, which is not a file; configs/ has {', '.join(there)}")
    # The configs import one another from a package of this name.
    spec = importlib.util.spec_from_file_location("configs", folder / "__init__.py")
    assert spec is not None
    sys.modules.setdefault("configs", importlib.util.module_from_spec(spec))
    return f"--config={path}{colon}{told}"


def run() -> None:
    """Parses the flags and calls `main`."""
    memory.restart_with_huge_pages()
    app.run(main, flags_parser=parse_flags)
