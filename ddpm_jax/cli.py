"""The command line: its flags, how they are read, and `main`, which `main.py` and `python -m ddpm_jax` call."""

import importlib.util
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from ddpm_jax import usage

FLAGS = flags.FLAGS
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File with the config; any field can be set with --config.section.field=value.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "Folder of the run; only doctor, prepare and, with --config, plan can do without."
)
_MODE = flags.DEFINE_enum("mode", "train", list(usage.MODES), "What to do; --mode=sample --help says more of one.")

flags.DEFINE_string("init_from", None, "train: start from the averaged weights of this workdir.")
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
    "import of a single-file checkpoint: a folder with CLIP's vocab.json and merges.txt; by default the hub's.",
)
flags.DEFINE_enum(
    "prediction", None, ["eps", "v"], "import of a single-file checkpoint: what the network predicts; needed for 2.x."
)

# Which weights, and how to sample with them.
flags.DEFINE_integer("step", None, "Step of the checkpoint to open; by default the newest.")
flags.DEFINE_float("ema_decay", None, "Decay of the moving average to use; by default the config's first.")
flags.DEFINE_bool("raw", False, "Use the weights as trained instead of a moving average.")
flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Of the weights in memory and of the arithmetic; by default the config's."
)
flags.DEFINE_multi_string(
    "lora", [], "Stable Diffusion: a LoRA file to add, as FILE or FILE:WEIGHT (by default 1); repeated for several."
)
flags.DEFINE_integer("height", None, "Height of the pictures; by default the config's.", lower_bound=1)
flags.DEFINE_integer("width", None, "Width of the pictures; by default the config's.", lower_bound=1)
flags.DEFINE_integer(
    "seed", 0, "Image i depends on the seed, i and the settings alone.", lower_bound=0, upper_bound=2**32 - 1
)
flags.DEFINE_integer(
    "batch_size", None, "Images at a time; by default the config's; serve: of a request, by default 8.", lower_bound=1
)


class _PerStage(flags.ArgumentParser):
    """A number, or one for each stage of a pipeline, such as 2,1."""

    def __init__(self, kind: Callable[[str], Any], least: float):
        self._kind, self._least = kind, least

    def parse(self, argument: Any) -> Any:
        values = [self._kind(part) for part in str(argument).split(",")]
        if min(values) < self._least:
            raise ValueError(f"must be {self._least} or more")
        return values if len(values) > 1 else values[0]


def _define_per_stage(name: str, kind: Callable[[str], Any], help: str, least: float = -math.inf) -> Any:
    return flags.DEFINE(_PerStage(kind, least), name, None, help, serializer=flags.ArgumentSerializer())


flags.DEFINE_string("sampler", None, "ddpm, ddim, dpmpp_2m, dpmpp_2m_sde, heun, unipc or plms.")
_define_per_stage("num_steps", int, "Timesteps to call the network at; or one for each stage.", 1)
flags.DEFINE_string("spacing", None, "linspace, leading, trailing, quadratic, logsnr or karras.")
flags.DEFINE_float("eta", None, "Of ddim: 0, deterministic, to 1.")
flags.DEFINE_bool("clip", None, "The predicted x_0 to [-1, 1].")
flags.DEFINE_float("dynamic_threshold", None, "A quantile for dynamic thresholding.")
flags.DEFINE_integer("order", None, "Of unipc: 1, 2 or 3.")
_define_per_stage(
    "guidance_scale", float, "Of prompts or classes: 1 is none, more exaggerates them; or one for each stage."
)
flags.DEFINE_float("guidance_rescale", None, "0 to 1: back to the usual contrast.")
flags.DEFINE_list("timesteps", None, "The timesteps themselves, descending, in place of num_steps.")
flags.DEFINE_list("guidance_interval", None, "LOWEST,HIGHEST timestep to guide.")
flags.DEFINE_list("classes", [], "Of a class-conditional run: 0,1,2; a grid has a row for each.")
flags.DEFINE_multi_string(
    "prompt", [], "Of a run that learned from captions; repeated for several: a grid has a row for each."
)
flags.DEFINE_string("prompts", None, "A text file with a prompt in each line, after those of --prompt.")
flags.DEFINE_multi_string("negative_prompt", [], "What guidance leads away from; repeated: one for each prompt.")

# What to make, and where to write it.
flags.DEFINE_integer("num_images", None, "How many images; by default the config's, or 8 per row.", lower_bound=1)
flags.DEFINE_string("images", None, "sample: numbers FIRST-LAST, in .npz shards; goes on where it stopped.")
flags.DEFINE_integer("shard_size", 1000, "sample with --images: images per shard.")
flags.DEFINE_string("part", "0/1", "sample with --images: I/N, the I-th of N processes that share the shards.")
flags.DEFINE_enum("output", "grid", ["grid", "png", "npz"], "sample: one picture, many, or an array.")
flags.DEFINE_string(
    "out",
    None,
    "Where to write; by default a name in WORKDIR/samples. "
    "export: the folder for diffusers, or a .safetensors file of the parameters by their names here.",
)
flags.DEFINE_bool(
    "adapters", False, "export: only the adapters that the run trained (config.lora), as a LoRA file for diffusers."
)
flags.DEFINE_string("caption", None, "text_difference: of the picture.")
flags.DEFINE_string("target_caption", None, "text_difference: of what the picture becomes.")
flags.DEFINE_list("input", [], "Pictures to edit: files, or data:17 for a training image.")
flags.DEFINE_string("mask", None, "inpaint: a picture, white where it shall be painted anew.")
flags.DEFINE_list("t", [], "interpolate, vary, denoise, coarse_to_fine: timesteps to diffuse to.")
flags.DEFINE_float(
    "strength", None, "vary: instead of --t, the share of the sampling steps to take, above 0 to 1, as in diffusers."
)
flags.DEFINE_list("weights", [], "interpolate: shares of the second picture; by default 0 to 1 by 0.1.")
flags.DEFINE_bool("latents", False, "interpolate: along the arc between DDIM's noises of both.")
flags.DEFINE_integer("jump", None, "inpaint: steps in each of RePaint's jumps back; by default 10.", lower_bound=1)
flags.DEFINE_integer("times", None, "inpaint: how many times RePaint runs each jump; by default once.", lower_bound=1)
flags.DEFINE_integer("num_stages", None, "progressive: pictures on the way, 10 or so.", lower_bound=2)
flags.DEFINE_enum("of", "x_0", ["x_0", "x"], "progressive: show the predicted x_0, or the noisy x_t.")
flags.DEFINE_integer("num_neighbours", 5, "neighbours: how many per sample.", lower_bound=1)

flags.DEFINE_string(
    "features",
    None,
    "evaluate: digits, a classifier of the embedded digits; inception, FID's, fetched once; or its weights' file.",
)
flags.DEFINE_string(
    "against", "data", "evaluate: real images: data (the run's), a folder, a .npz or .npy, or a reference file."
)
flags.DEFINE_string("generated", None, "evaluate: images to judge instead of samples: a folder, .npz or shards.")
flags.DEFINE_string(
    "likelihood", "estimate", "evaluate: bits/dim by an estimate of the bound, the whole bound, the flow, or none."
)
flags.DEFINE_integer("likelihood_images", 256, "evaluate: of how many training images.", lower_bound=2)
flags.DEFINE_string(
    "clip_model",
    None,
    "evaluate: a CLIP's workdir, or a transformers folder of a CLIPModel, for CLIPScore of samples and prompts.",
)
flags.DEFINE_string("save_reference", None, "evaluate: .npz for the moments of the real images.")

flags.DEFINE_string("topology", None, "plan: a TPU slice to compile for, such as v5e:2x4; by default measures here.")
flags.DEFINE_list(
    "programs", [], "plan: which of train, sample, decode (of latents) and evaluate; by default all that the run has."
)

flags.DEFINE_string("host", "127.0.0.1", "serve: the address to listen at; by default for this machine alone.")
flags.DEFINE_integer(
    "port", 8000, "serve: the port to listen at; 0: one that is free.", lower_bound=0, upper_bound=65535
)
flags.DEFINE_integer("queue", 16, "serve: requests that may wait; more are told to come again.", lower_bound=0)

_COORDINATOR = flags.DEFINE_string("coordinator", "", "Several hosts: host:port of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Several hosts: how many processes.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Several hosts: which of them this is, from 0.", lower_bound=0)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Several hosts: learn all that from the TPU pod, Slurm, Open MPI, Kubernetes, or JAX_COORDINATOR_ADDRESS, "
    "JAX_NUM_PROCESSES and JAX_PROCESS_ID.",
)
_START_TIMEOUT = flags.DEFINE_integer(
    "start_timeout", 300, "Several hosts: seconds in which all must have come together.", lower_bound=1
)
_SILENCE_TIMEOUT = flags.DEFINE_integer(
    "silence_timeout", 60, "Several hosts: seconds after which a silent process is gone, and all end.", lower_bound=1
)
_COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "Folder that keeps compiled programs for the next start; by default one in the user's cache; off: none.",
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}; every option starts with --")
    if not _WORKDIR.value and _MODE.value not in ("doctor", "prepare", "plan" if _CONFIG.value is not None else ""):
        raise app.UsageError("--workdir must be given")
    if not FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
        hush_checkpoints()
    # Imported here so that --help and a misspelt flag are answered at once.
    from ddpm_jax import modes
    from ddpm_jax.runtime import parallel, processes
    from ddpm_jax.runtime.errors import UserError

    try:
        parallel.keep_freed_memory()
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


def hush_checkpoints() -> None:
    """Leaves a failed save to the one sentence that is raised for it.

    Orbax logs the same with a traceback, and then asyncio and TensorStore do so for every array.
    """
    logging.get_absl_handler().addFilter(lambda record: not {"orbax", "asyncio"} & {*Path(record.pathname).parts})

    def report(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = report


def advice() -> str:
    """What to do when a multi-host job went down."""
    again = "start the same command on every host again"
    if _MODE.value != "train":
        return again
    from ddpm_jax.runtime.checkpoints import newest_step

    step = newest_step(Path(_WORKDIR.value).expanduser())
    return f"{again}: " + ("it begins anew" if step is None else f"it goes on from the checkpoint of step {step}")


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with one sentence for a flag, a value, a config file or a config field that does not exist.

    A config that is no file is looked for among those that come with the package. Help is no failure: its status is 0.
    """
    from ddpm_jax.runtime.errors import UserError

    if len(argv) == 1:
        print(usage.BEGIN, end="")
        sys.exit(0)
    is_help = [argument.lstrip("-") in ("h", "help", "helpshort") for argument in argv]
    asked_for = zip(argv, is_help, strict=True)
    argv = [_with_config_found(argument) for argument, ignored in asked_for if not ignored]
    try:
        positional = FLAGS(argv)
        if any(is_help):
            print(usage.of_mode(_MODE.value) if FLAGS["mode"].present else usage.overview(), end="")
            sys.exit(0)
        return positional
    except SystemExit as end:  # absl's status for help is 1
        asked = {argument.lstrip("-").partition("=")[0] for argument in argv[1:]}
        sys.exit(0 if asked & {"helpfull", "helpxml"} else end.code)
    except flags.UnrecognizedFlagError as error:
        sys.exit(f"error: {_unknown_flag(error.flagname)}")
    except flags.Error as error:
        sys.exit(f"error: {_illegal_value(error)}")
    except UserError as error:  # of a config file's function
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
                    sys.exit(f"error: config field {whole!r} is set whole: --config.{whole}='{{\"{rest}\": 0.5}}'")
            if prefix == "config" and dot and field not in known:
                sys.exit(f"error: config field {field!r} does not exist.{nearest(field, known)}")
        raise


def _unknown_flag(name: str) -> str:
    from ddpm_jax.runtime.errors import nearest

    prefix, dot, field = name.partition(".")
    if prefix == "config":
        return f"--{name} needs --config too: the file whose {field} it sets"
    known = [f"--{flag.name}" for flag in FLAGS.get_flags_for_module(__name__)]
    if dot:
        from ddpm_jax.config import default_config, fields

        known += [f"--config.{field}" for field, _ in fields(default_config())]
    return f"flag --{name} does not exist.{nearest(f'--{name}', known) or ' --help lists all.'}"


def _illegal_value(error: flags.Error) -> str:
    """What absl says of a value, in one sentence; of one of several choices with the nearest."""
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
    value, colon, told = value.partition(":")  # behind it stands what the file's get_config is called with
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
    """The command line: parses the flags and calls main."""
    app.run(main, flags_parser=parse_flags)
