"""The texts of the command line: what to type first, and --help."""

import re
import sys
import textwrap
from pathlib import Path

from absl import flags

_WIDTH = 100
_CHOICES = re.compile(r"(?:<(.*?)>: )?(.*)", re.DOTALL)
_TITLE = "ddpm_jax trains diffusion models and draws with them."
_FIRST_COMMANDS = {
    "--config=configs/digits.py --workdir=runs/digits": "trains on handwritten digits, in minutes",
    "--mode=sample --workdir=runs/digits": "draws new ones, into runs/digits/samples",
    "--config=configs/numbers.py --workdir=runs/numbers": "trains a small text-to-image model, in minutes",
    "--mode=sample --workdir=runs/numbers --prompt=forty-two": "draws what the prompt says",
    "--mode=doctor": "checks this machine",
    "--help": "lists all modes",
}
# The modes and what they do, grouped by purpose.
GROUPS: dict[str, dict[str, str]] = {
    "Train": {
        "train": "trains, or resumes from the last checkpoint; the default mode",
        "prepare": "downloads and checks the training set of a config, before training",
        "compose": "makes a pipeline of several runs, each of which takes the output of the one before it",
    },
    "Sample": {
        "sample": "draws images, also by class or by prompt; with --images as shards",
        "progressive": "shows the way from noise to image",
        "coarse_to_fine": "draws images that share the beginning of that way",
        "neighbours": "shows samples beside their nearest training images",
        "serve": "opens the playground, a page in the browser that draws with a run",
    },
    "Edit pictures": {
        "interpolate": "interpolates between two pictures, prompts or classes",
        "vary": "draws variations of pictures",
        "denoise": "removes the noise of noisy pictures",
        "inpaint": "repaints a part of a picture",
        "upscale": "enlarges pictures with a super-resolution run",
        "variations": "draws new pictures from the image embeddings of existing ones (DALL-E 2)",
        "blend": "interpolates between the image embeddings of two pictures (DALL-E 2)",
        "text_difference": "changes a picture by the difference of two captions (DALL-E 2)",
    },
    "Evaluate": {
        "evaluate": "compares samples, or other images, with real ones: FID, KID, bits/dim",
        "report": "writes report.html, a run on one page, which training and evaluation keep up to date",
    },
    "Exchange weights": {
        "import": "makes a workdir from other projects' weights, such as Stable Diffusion's",
        "export": "writes a run's weights for other projects, such as diffusers",
    },
    "Check and plan": {
        "doctor": "reports what this machine has and what would make a run fail",
        "plan": "estimates what a run costs on a TPU slice, with no TPU needed, or measures it on this machine",
    },
}
MODES = {mode: what for group in GROUPS.values() for mode, what in group.items()}
_EXAMPLES = (
    "--config=configs/cifar10.py --workdir=runs/cifar10 --config.train.batch_size=64",
    "--mode=sample --workdir=runs/digits --num_images=256 --seed=1 --sampler=dpmpp_2m --num_steps=20",
    '--mode=sample --workdir=runs/numbers --prompt="forty-two" --prompt="seventeen" --guidance_scale=2',
    "--mode=inpaint --workdir=runs/digits --input=a.png --mask=hole.png",
    "--mode=import --source=stable-diffusion-v1-5/stable-diffusion-v1-5 --workdir=runs/sd15",
)
_FIRST, _LAST = "workdir", "compilation_cache"
_HOSTS = (
    *("coordinator", "num_processes", "process_id", "distributed"),
    *("start_timeout", "silence_timeout"),
)


def program() -> list[str]:
    """The words that start the command line, as the user typed them."""
    is_script = Path(sys.argv[0]).name == "main.py"
    return ["python", sys.argv[0]] if is_script else ["python", "-m", "ddpm_jax"]


def introduction() -> str:
    """What a command without flags prints."""
    width = max(map(len, _FIRST_COMMANDS))
    start = " ".join(program())
    lines = [f"  {start} {command:{width}}  {what}" for command, what in _FIRST_COMMANDS.items()]
    return "\n".join([f"{_TITLE} First commands:", "", *lines]) + "\n"


def overview() -> str:
    """--help: the modes by purpose, and examples."""
    start = " ".join(program())
    lines = [_TITLE, "", f"  {start} [--mode=MODE] --workdir=FOLDER ...", ""]
    for group, modes in GROUPS.items():
        lines += [f"{group}:", *(f"  {mode:16} {what}" for mode, what in modes.items()), ""]
    lines += [
        "--mode=sample --help lists the flags of that mode, --helpfull the flags of all modes.",
        "--config.SECTION.FIELD=VALUE sets a field of the config; ddpm_jax/config/defaults.py explains all fields.",
        "",
        "Examples:",
        *(f"  {start} {example}" for example in _EXAMPLES),
    ]
    return "\n".join(lines) + "\n"


def of_mode(mode: str) -> str:
    """--mode=MODE --help: the flags of the mode."""
    from ddpm_jax import modes

    names = modes.flags_of_mode(mode)
    defined = [flag.name for flag in flags.FLAGS.get_flags_for_module("ddpm_jax.cli")]
    own = [name for name in defined if name in names - {_FIRST, _LAST}]
    lines = [f"--mode={mode}: {MODES[mode]}", ""]
    lines += [line for name in (_FIRST, *own, _LAST) for line in _of_flag(name, mode)]
    lines += ["", "On several hosts:", *(line for name in _HOSTS for line in _of_flag(name, "Several hosts"))]
    return "\n".join(lines) + "\n"


def _of_flag(name: str, where: str) -> list[str]:
    """A flag and its help, without the modes that the help begins with if `where` is one of them."""
    flag = flags.FLAGS[name]
    default = "" if flag.default in (None, "", [], False) else f" (default: {_shown(flag.default)})"
    title, indent = f"  --{name}", " " * 22
    # absl puts the choices before the help, and for a repeatable flag adds a remark after it.
    choices, help = _CHOICES.fullmatch(flag.help.split(";\n")[0]).groups()  # type: ignore[union-attr]
    modes, _, rest = help.partition(": ")
    help = rest if where in modes.split(", ") else help
    help += f" One of {choices.replace('|', ', ')}." if choices else ""
    text = textwrap.wrap(f"{help[:1].upper()}{help[1:]}{default}", _WIDTH - len(indent))
    if len(title) >= len(indent):
        return [title, *(indent + line for line in text)]
    return [title.ljust(len(indent)) + text[0], *(indent + line for line in text[1:])]


def _shown(default: object) -> str:
    return ",".join(map(str, default)) if isinstance(default, list) else str(default)
