"""Denoising Diffusion Probabilistic Models in JAX: trains a run, samples from it, edits pictures, exchanges weights.

Train, or go on from the last checkpoint:
  python main.py --config=configs/digits.py --workdir=runs/digits
  python main.py --config=configs/cifar10.py --workdir=runs/cifar10 --config.train.batch_size=64

Sample from a workdir; the config lies in it:
  python main.py --mode=sample --workdir=runs/digits --num_images=256 --seed=1 --output=png
  python main.py --mode=sample --workdir=runs/digits --images=0-49999 --sampler=dpmpp_2m --num_steps=20

Draw what a prompt says, by a run that learned from captions:
  python main.py --config=configs/numbers.py --workdir=runs/numbers
  python main.py --mode=sample --workdir=runs/numbers --prompt="forty-two" --prompt="seventeen" --guidance_scale=2

Mix, vary, denoise or repair pictures, or watch how they come about:
  python main.py --mode=interpolate --workdir=runs/digits --input=a.png,b.png
  python main.py --mode=inpaint --workdir=runs/digits --input=a.png --mask=hole.png --times=5
  python main.py --mode=progressive --workdir=runs/digits

Make a workdir of other people's weights, or a folder for diffusers of a workdir:
  python main.py --mode=import --source=google/ddpm-cifar10-32 --workdir=runs/imported
  python main.py --mode=export --workdir=runs/digits --out=digits-diffusers
  python main.py --mode=import --source=model.safetensors --tokenizer=path/to/tokenizer --workdir=runs/sd

Play with a run in the browser:
  python main.py --mode=serve --workdir=runs/digits

Know what this machine has and what would go wrong on it, and what a run costs before the machine is rented:
  python main.py --mode=doctor
  python main.py --mode=plan --config=configs/cifar10.py --config.model.dtype=bfloat16 --topology=v5e:2x4
"""

import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

if TYPE_CHECKING:
    from ddpm_jax.commands.job import Job

FLAGS = flags.FLAGS
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File with the config; any field can be set with --config.section.field=value.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "Folder of the run; only doctor, prepare and, with --config, plan can do without."
)
_MODES = {
    "train": "trains, or goes on from the last checkpoint",
    "sample": "images from noise",
    "interpolate": "between two pictures, prompts or classes",
    "vary": "other pictures like given ones",
    "denoise": "clean pictures of noisy ones",
    "upscale": "pictures enlarged by a super-resolution run",
    "variations": "other pictures with the image embedding of given ones",
    "blend": "between the image embeddings of two pictures",
    "text_difference": "a picture moved by what one caption has over another",
    "inpaint": "a part of a picture painted anew",
    "progressive": "the way from noise to image",
    "coarse_to_fine": "images that share the beginning of that way",
    "neighbours": "samples and the training images nearest to them",
    "evaluate": "samples, or given images, judged against real ones",
    "prepare": "the images of a config, checked or fetched and prepared, and where they lie; trains nothing",
    "compose": "a pipeline of runs, each of which is given what the one before it makes",
    "report": "report.html of a workdir, which training and evaluating keep up to date",
    "import": "a workdir of other people's weights",
    "export": "a run's weights for others",
    "doctor": "what this machine has, and what would go wrong",
    "plan": "what a run costs on a TPU that need not be here, or on what is here",
    "serve": "a page in the browser to play with a run",
}
_MODE = flags.DEFINE_enum("mode", "train", list(_MODES), "; ".join(f"{mode}: {what}" for mode, what in _MODES.items()))

_INIT_FROM = flags.DEFINE_string("init_from", None, "train: start from the averaged weights of this workdir.")
_SOURCE = flags.DEFINE_string(
    "source",
    None,
    "import: a diffusers folder, its name on the Hugging Face hub, an exported .safetensors file, or a single-file "
    "checkpoint of Stable Diffusion (.safetensors or .ckpt).",
)
_STAGES = flags.DEFINE_list("stages", [], "compose: the workdirs of the runs, in order.")
_TOKENIZER = flags.DEFINE_string(
    "tokenizer",
    None,
    "import of a single-file checkpoint: a folder with CLIP's vocab.json and merges.txt; by default the hub's.",
)
_PREDICTION = flags.DEFINE_enum(
    "prediction", None, ["eps", "v"], "import of a single-file checkpoint: what the network predicts; needed for 2.x."
)

# Which weights, and how to sample with them.
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint to open; by default the newest.")
_EMA_DECAY = flags.DEFINE_float("ema_decay", None, "Decay of the moving average to use; by default the config's first.")
_RAW = flags.DEFINE_bool("raw", False, "Use the weights as trained instead of a moving average.")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Of the weights in memory and of the arithmetic; by default the config's."
)
_LORA = flags.DEFINE_multi_string(
    "lora", [], "Stable Diffusion: a LoRA file to add, as FILE or FILE:WEIGHT (by default 1); repeated for several."
)
_HEIGHT = flags.DEFINE_integer("height", None, "Height of the pictures; by default the config's.", lower_bound=1)
_WIDTH = flags.DEFINE_integer("width", None, "Width of the pictures; by default the config's.", lower_bound=1)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Image i depends on the seed, i and the settings alone.", lower_bound=0, upper_bound=2**32 - 1
)
_BATCH_SIZE = flags.DEFINE_integer(
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


_OPTIONS = {
    "sampler": flags.DEFINE_string("sampler", None, "ddpm, ddim, dpmpp_2m, dpmpp_2m_sde, heun, unipc or plms."),
    "num_steps": _define_per_stage("num_steps", int, "Timesteps to call the network at; or one for each stage.", 1),
    "spacing": flags.DEFINE_string("spacing", None, "linspace, leading, trailing, quadratic, logsnr or karras."),
    "eta": flags.DEFINE_float("eta", None, "Of ddim: 0, deterministic, to 1."),
    "clip": flags.DEFINE_bool("clip", None, "The predicted x_0 to [-1, 1]."),
    "dynamic_threshold": flags.DEFINE_float("dynamic_threshold", None, "A quantile for dynamic thresholding."),
    "order": flags.DEFINE_integer("order", None, "Of unipc: 1, 2 or 3."),
    "guidance_scale": _define_per_stage(
        "guidance_scale", float, "Of prompts or classes: 1 is none, more exaggerates them; or one for each stage."
    ),
    "guidance_rescale": flags.DEFINE_float("guidance_rescale", None, "0 to 1: back to the usual contrast."),
}
_TIMESTEPS = flags.DEFINE_list("timesteps", None, "The timesteps themselves, descending, in place of num_steps.")
_GUIDANCE_INTERVAL = flags.DEFINE_list("guidance_interval", None, "LOWEST,HIGHEST timestep to guide.")
_CLASSES = flags.DEFINE_list("classes", [], "Of a class-conditional run: 0,1,2; a grid has a row for each.")
_PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "Of a run that learned from captions; repeated for several: a grid has a row for each."
)
_PROMPTS = flags.DEFINE_string("prompts", None, "A text file with a prompt in each line, after those of --prompt.")
_NEGATIVE_PROMPT = flags.DEFINE_multi_string(
    "negative_prompt", [], "What guidance leads away from; repeated: one for each prompt."
)

# What to make, and where to write it.
_NUM_IMAGES = flags.DEFINE_integer(
    "num_images", None, "How many images; by default the config's, or 8 per row.", lower_bound=1
)
_IMAGES = flags.DEFINE_string("images", None, "sample: numbers FIRST-LAST, in .npz shards; goes on where it stopped.")
_SHARD_SIZE = flags.DEFINE_integer("shard_size", 1000, "sample with --images: images per shard.")
_PART = flags.DEFINE_string("part", "0/1", "sample with --images: I/N, the I-th of N processes that share the shards.")
_OUTPUT = flags.DEFINE_enum("output", "grid", ["grid", "png", "npz"], "sample: one picture, many, or an array.")
_OUT = flags.DEFINE_string(
    "out",
    None,
    "Where to write; by default a name in WORKDIR/samples. "
    "export: the folder for diffusers, or a .safetensors file of the parameters by their names here.",
)
_ADAPTERS = flags.DEFINE_bool(
    "adapters", False, "export: only the adapters that the run trained (config.lora), as a LoRA file for diffusers."
)
_CAPTION = flags.DEFINE_string("caption", None, "text_difference: of the picture.")
_TARGET_CAPTION = flags.DEFINE_string("target_caption", None, "text_difference: of what the picture becomes.")
_INPUT = flags.DEFINE_list("input", [], "Pictures to edit: files, or data:17 for a training image.")
_MASK = flags.DEFINE_string("mask", None, "inpaint: a picture, white where it shall be painted anew.")
_T = flags.DEFINE_list("t", [], "interpolate, vary, denoise, coarse_to_fine: timesteps to diffuse to.")
_STRENGTH = flags.DEFINE_float(
    "strength", None, "vary: instead of --t, the share of the sampling steps to take, above 0 to 1, as in diffusers."
)
_WEIGHTS = flags.DEFINE_list("weights", [], "interpolate: shares of the second picture; by default 0 to 1 by 0.1.")
_LATENTS = flags.DEFINE_bool("latents", False, "interpolate: along the arc between DDIM's noises of both.")
_JUMP = flags.DEFINE_integer(
    "jump", None, "inpaint: steps in each of RePaint's jumps back; by default 10.", lower_bound=1
)
_TIMES = flags.DEFINE_integer(
    "times", None, "inpaint: how many times RePaint runs each jump; by default once.", lower_bound=1
)
_NUM_STAGES = flags.DEFINE_integer("num_stages", None, "progressive: pictures on the way, 10 or so.", lower_bound=2)
_OF = flags.DEFINE_enum("of", "x_0", ["x_0", "x"], "progressive: show the predicted x_0, or the noisy x_t.")
_NUM_NEIGHBOURS = flags.DEFINE_integer("num_neighbours", 5, "neighbours: how many per sample.", lower_bound=1)

_FEATURES = flags.DEFINE_string(
    "features",
    None,
    "evaluate: digits, a classifier of the embedded digits; inception, FID's, fetched once; or its weights' file.",
)
_AGAINST = flags.DEFINE_string(
    "against", "data", "evaluate: real images: data (the run's), a folder, a .npz or .npy, or a reference file."
)
_GENERATED = flags.DEFINE_string(
    "generated", None, "evaluate: images to judge instead of samples: a folder, .npz or shards."
)
_LIKELIHOOD = flags.DEFINE_string(
    "likelihood", "estimate", "evaluate: bits/dim by an estimate of the bound, the whole bound, the flow, or none."
)
_LIKELIHOOD_IMAGES = flags.DEFINE_integer(
    "likelihood_images", 256, "evaluate: of how many training images.", lower_bound=2
)
_CLIP_MODEL = flags.DEFINE_string(
    "clip_model", None, "evaluate: a transformers folder of a CLIPModel, for CLIPScore of samples and their prompts."
)
_SAVE_REFERENCE = flags.DEFINE_string("save_reference", None, "evaluate: .npz for the moments of the real images.")

_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "plan: a TPU slice to compile for, such as v5e:2x4; by default measures here."
)
_PROGRAMS = flags.DEFINE_list(
    "programs", [], "plan: which of train, sample, decode (of latents) and evaluate; by default all that the run has."
)

_HOST = flags.DEFINE_string("host", "127.0.0.1", "serve: the address to listen at; by default for this machine alone.")
_PORT = flags.DEFINE_integer(
    "port", 8000, "serve: the port to listen at; 0: one that is free.", lower_bound=0, upper_bound=65535
)
_QUEUE = flags.DEFINE_integer("queue", 16, "serve: requests that may wait; more are told to come again.", lower_bound=0)

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
            run_mode(_MODE.value)
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


# The flags that a job is made of: which weights and where to, and how to sample with them.
_OF_SAMPLING = {
    *("seed", "height", "width", "classes", "prompt", "prompts", "negative_prompt", "guidance_interval", "timesteps"),
    *_OPTIONS,
}
_OF_A_JOB = {"step", "ema_decay", "raw", "dtype", "lora", "out", *_OF_SAMPLING}


def run_mode(mode: str) -> None:
    """Calls the function of the mode: each of its parameters is the flag of that name, but for `job`."""
    from ddpm_jax.commands import compose, doctor, editing, evaluation, plan, prepare, sampling, serve, weights
    from ddpm_jax.runtime.errors import UserError

    functions: dict[str, Callable[..., Any]] = {
        "train": train,
        "sample": sampling.sample if _IMAGES.value is None else sampling.sample_shards,
        "interpolate": _interpolation(),
        "vary": editing.vary,
        "denoise": editing.denoise,
        "upscale": editing.upscale,
        "variations": editing.variations,
        "blend": editing.blend,
        "text_difference": editing.text_difference,
        "inpaint": editing.inpaint,
        "progressive": sampling.progressive,
        "coarse_to_fine": editing.coarse_to_fine,
        "neighbours": sampling.neighbours,
        "evaluate": evaluation.compare_paths if _compares_paths() else evaluation.evaluate,
        "prepare": prepare.prepare,
        "compose": compose.compose,
        "report": report,
        "import": weights.import_weights,
        "export": weights.export_autoencoder if _holds_autoencoder() else weights.export_weights,
        "doctor": doctor.doctor,
        "plan": plan.plan,
        "serve": serve.serve,
    }
    without: dict[Callable[..., Any], set[str]] = {  # what a function has no use for among the flags of a job
        editing.interpolate: {"timesteps"},
        editing.interpolate_latents: _OF_SAMPLING - {"height", "width", "num_steps", "spacing"},
        editing.vary: {"timesteps"},
        editing.denoise: {"timesteps"},
        **{
            edit: {"timesteps"}
            for edit in (editing.upscale, editing.variations, editing.blend, editing.text_difference)
        },
        editing.inpaint: {"timesteps"},
        editing.coarse_to_fine: {"timesteps"},
        evaluation.evaluate: {"out"},
        weights.export_weights: {"dtype", *_OF_SAMPLING},
        serve.serve: {"out", *_OF_SAMPLING} - {"height", "width"},
    }

    def flags_of(function: Callable[..., Any]) -> set[str]:
        names = set(inspect.signature(function).parameters)
        return (names | (_OF_A_JOB if "job" in names else set())) - {"job", "workdir"} - without.get(function, set())

    accepted = flags_of(functions[mode]) | ({"latents"} if mode == "interpolate" else set())
    variant = " --images" if "images" in accepted else " --latents" if _LATENTS.value else ""
    if functions[mode] is editing.interpolate_words:
        variant = " without --input"
    if functions[mode] is weights.export_autoencoder:
        variant = " of an autoencoder"
    every: list[Callable[..., Any]] = [
        *functions.values(),
        sampling.sample,
        sampling.sample_shards,
        editing.interpolate,
        editing.interpolate_words,
        weights.export_weights,
    ]
    known = {"latents"}.union(*map(flags_of, every))
    for name in sorted(known - accepted):
        if FLAGS[name].present:
            raise UserError(f"--{name} does nothing with --mode={mode}{variant}")
    told = {name: _as_text(name) for name in sorted(accepted - _NOT_IN_NAMES) if FLAGS[name].present}
    arguments = {
        name: make_job(told) if name == "job" else FLAGS[name].value
        for name in inspect.signature(functions[mode]).parameters
    }
    functions[mode](**arguments)


def _interpolation() -> Callable[..., Any]:
    """The function of --mode=interpolate: between pictures, or, where there are none, between prompts or classes."""
    from ddpm_jax.commands import editing

    if _LATENTS.value:
        return editing.interpolate_latents
    of_words = not _INPUT.value and (_PROMPT.value or _PROMPTS.value or _CLASSES.value)
    return editing.interpolate_words if of_words else editing.interpolate


def _compares_paths() -> bool:
    """Whether --mode=evaluate is told of two sets of images and of no run."""
    given = FLAGS["against"].present and FLAGS["generated"].present
    return bool(given) and not (Path(_WORKDIR.value).expanduser() / "config.json").exists()


def _holds_autoencoder() -> bool:
    """Whether --mode=export is of a workdir in which an autoencoder was trained."""
    from ddpm_jax.runtime import workdir

    return _MODE.value == "export" and workdir.read_config(_WORKDIR.value).train.objective == "autoencoder"


# Flags of a job that its file's name has in another place, or that decide nothing of its pictures.
_NOT_IN_NAMES = {"step", "seed", "out", "output", "batch_size", "images", "shard_size", "part"}


def _as_text(name: str) -> str:
    value = FLAGS[name].value
    if not isinstance(value, list):
        return str(value)
    return ("\n" if name in (_PROMPT.name, _NEGATIVE_PROMPT.name) else ",").join(
        map(str, value)
    )  # a prompt may have commas


def make_job(told: dict[str, str]) -> "Job":
    """What the flags say of a run; `told` as in `Job`."""
    from ddpm_jax.commands.job import Job, parse_loras, parse_numbers, read_lines
    from ddpm_jax.pipeline import load

    options: dict[str, Any] = {name: flag.value for name, flag in _OPTIONS.items() if flag.value is not None}
    for name, flag in (("timesteps", _TIMESTEPS), ("guidance_interval", _GUIDANCE_INTERVAL), ("labels", _CLASSES)):
        if flag.value:
            options[name] = parse_numbers(flag.name, flag.value)
    prompts = [*_PROMPT.value, *(read_lines(_PROMPTS.name, _PROMPTS.value) if _PROMPTS.value else ())]
    options |= {"prompts": prompts} if prompts else {}
    options |= {"negative_prompts": _NEGATIVE_PROMPT.value} if _NEGATIVE_PROMPT.value else {}
    weights = (_STEP.value, _EMA_DECAY.value, _RAW.value, _DTYPE.value, parse_loras(_LORA.value))
    step, ema_decay, raw, dtype, loras = weights
    run = load(_WORKDIR.value, step, ema_decay=ema_decay, raw=raw, dtype=dtype, loras=loras)
    run = run.at(_HEIGHT.value, _WIDTH.value)
    return Job(run, Path(_WORKDIR.value).expanduser(), _SEED.value, _OUT.value, options, told)


def train(config: ConfigDict | None, init_from: str | None) -> None:
    from ddpm_jax.runtime import workdir
    from ddpm_jax.training.loop import train

    config = config if config is not None else workdir.read_config(_WORKDIR.value)
    if init_from is not None:
        config.train.init_from = init_from
    train(config, _WORKDIR.value)


def report() -> None:
    from ddpm_jax.report import write

    print(write(_WORKDIR.value))


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, with one sentence for a flag, a value, a config file or a config field that does not exist.

    A config that is no file is looked for among those that come with the package. Help is no failure: its status is 0.
    """
    from ddpm_jax.runtime.errors import UserError

    argv = [argv[0], *("--help" if argument == "-h" else _with_config_found(argument) for argument in argv[1:])]
    try:
        return FLAGS(argv)
    except SystemExit as end:  # absl's status for help is 1
        asked = {argument.lstrip("-").partition("=")[0] for argument in argv[1:]}
        sys.exit(0 if asked & {"help", "helpshort", "helpfull", "helpxml", "?"} else end.code)
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
