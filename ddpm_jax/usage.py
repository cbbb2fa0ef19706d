"""What the command line says of itself: without flags, and with --help."""

import textwrap

from absl import flags

_WIDTH = 100
BEGIN = """\
ddpm_jax trains diffusion models and draws with them. To begin:

  python main.py --config=configs/digits.py --workdir=runs/digits      trains on handwritten digits, in minutes
  python main.py --mode=sample --workdir=runs/digits                   draws new ones; look into runs/digits/samples
  python main.py --mode=doctor                                         checks this machine
  python main.py --help                                                lists everything
"""
# What the modes do, by what one wants to do.
GROUPS: dict[str, dict[str, str]] = {
    "Train": {
        "train": "trains, or goes on from the last checkpoint; the mode if none is given",
        "prepare": "fetches, prepares and checks the images of a config, and trains nothing",
        "compose": "makes a pipeline of runs, each of which is given what the one before it makes",
    },
    "Sample": {
        "sample": "images from noise, by class or by prompt; with --images in shards",
        "progressive": "the way from noise to image",
        "coarse_to_fine": "images that share the beginning of that way",
        "neighbours": "samples and the training images nearest to them",
        "serve": "a page in the browser to play with a run",
    },
    "Edit pictures": {
        "interpolate": "between two pictures, prompts or classes",
        "vary": "other pictures like given ones",
        "denoise": "clean pictures of noisy ones",
        "inpaint": "a part of a picture painted anew",
        "upscale": "pictures enlarged by a super-resolution run",
        "variations": "other pictures with the image embedding of given ones (DALL-E 2)",
        "blend": "between the image embeddings of two pictures (DALL-E 2)",
        "text_difference": "a picture moved by what one caption has over another (DALL-E 2)",
    },
    "Judge": {
        "evaluate": "samples, or given images, judged against real ones",
        "report": "report.html of a workdir, which training and evaluating keep up to date",
    },
    "Exchange weights": {
        "import": "a workdir of other people's weights, such as Stable Diffusion's",
        "export": "a run's weights for others, such as a folder for diffusers",
    },
    "Know the machine": {
        "doctor": "what this machine has, and whatever would make a run fail",
        "plan": "what a run costs on a TPU that need not be here, or on the devices here",
    },
}
MODES = {mode: what for group in GROUPS.values() for mode, what in group.items()}
_EXAMPLES = """\
Examples:
  python main.py --config=configs/cifar10.py --workdir=runs/cifar10 --config.train.batch_size=64
  python main.py --mode=sample --workdir=runs/digits --num_images=256 --seed=1 --sampler=dpmpp_2m --num_steps=20
  python main.py --mode=sample --workdir=runs/numbers --prompt="forty-two" --prompt="seventeen" --guidance_scale=2
  python main.py --mode=inpaint --workdir=runs/digits --input=a.png --mask=hole.png
  python main.py --mode=import --source=stable-diffusion-v1-5/stable-diffusion-v1-5 --workdir=runs/sd15
"""
_EVERYWHERE = ("workdir", "compilation_cache")
_HOSTS = (
    *("coordinator", "num_processes", "process_id", "distributed"),
    *("start_timeout", "silence_timeout"),
)


def overview() -> str:
    """--help: the modes by what they are for, and examples."""
    lines = [BEGIN.splitlines()[0], "", "  python main.py [--mode=MODE] --workdir=FOLDER ...", ""]
    for group, modes in GROUPS.items():
        lines += [f"{group}:", *(f"  {mode:16} {what}" for mode, what in modes.items()), ""]
    lines += [
        "--mode=sample --help lists the flags of that mode, --helpfull those of all modes. Any field of a config can",
        "be set by --config.SECTION.FIELD=VALUE; ddpm_jax/config/defaults.py lists them with their meaning.",
        "",
    ]
    return "\n".join(lines) + "\n" + _EXAMPLES


def of_mode(mode: str) -> str:
    """--mode=... --help: the flags of the mode."""
    from ddpm_jax import modes

    names = set().union(*(modes.flags_of(function) for function in modes.FUNCTIONS[mode].values()))
    names |= {"latents"} if mode == "interpolate" else set()
    lines = [f"--mode={mode}: {MODES[mode]}", ""]
    lines += [line for name in (*_EVERYWHERE, *sorted(names - set(_EVERYWHERE))) for line in _of_flag(name)]
    lines += ["", "On several hosts:", *(line for name in _HOSTS for line in _of_flag(name))]
    return "\n".join(lines) + "\n"


def _of_flag(name: str) -> list[str]:
    flag = flags.FLAGS[name]
    default = "" if flag.default in (None, "", [], False) else f" (default: {_shown(flag.default)})"
    title, indent = f"  --{name}", " " * 22
    said = flag.help.split(";     repeat")[0].removeprefix("Several hosts: ")
    text = textwrap.wrap(f"{said[:1].upper()}{said[1:]}{default}", _WIDTH - len(indent))
    if len(title) >= len(indent):
        return [title, *(indent + line for line in text)]
    return [title.ljust(len(indent)) + text[0], *(indent + line for line in text[1:])]


def _shown(default: object) -> str:
    return ",".join(map(str, default)) if isinstance(default, list) else str(default)
