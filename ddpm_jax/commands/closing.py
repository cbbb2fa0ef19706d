"""The last lines of a command: the files that it wrote, and a command to try next."""

import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from ddpm_jax import usage
from ddpm_jax.commands import serve
from ddpm_jax.evaluation import results
from ddpm_jax.runtime import workdir as workdir_lib
from ddpm_jax.runtime.checkpoints import newest_step
from ddpm_jax.runtime.files import read_json, read_json_lines

_SEEDS = 2**32
_LONGEST_PROMPT = 60  # characters
_PROMPT = "a lighthouse by the sea"  # for a run whose training captions are not known


def tell(mode: str, workdir: str, result: Any, given: Mapping[str, Any], weights: str = "") -> None:
    """Prints what a command wrote and, for the person who typed it, what to try next; only process 0 of a job does.

    The second line goes to stderr, so that stdout holds results alone.

    Args:
      mode, workdir: of the command; "": no workdir.
      result: what the mode's function returned.
      given: the flags of the command line by name, and "config", its --config flags as they are typed.
      weights: `Run.weights` of the run that was used.
    """
    # A single process is not asked for its index: that would open the devices, which --mode=report leaves alone.
    if jax.distributed.is_initialized() and jax.process_index() != 0:
        return
    files = written(mode, workdir, result, given)
    if files:
        print(f"wrote: {', '.join(map(str, files))}{f' ({weights})' if weights else ''}", flush=True)
    words = next_command(mode, workdir, files, given)
    if words:
        print(f"next:  {' '.join(map(_quoted, words))}", file=sys.stderr, flush=True)


def written(mode: str, workdir: str, result: Any, given: Mapping[str, Any]) -> list[Path]:
    """The files and folders that a command wrote, the arguments as in `tell`."""
    if mode == "evaluate":  # which returns its numbers
        others = [given["save_reference"]] if given.get("save_reference") else []
        return [_folder(workdir) / results.TABLE, *map(Path, others)]
    return [result] if isinstance(result, Path) else list(result or ())


def next_command(mode: str, workdir: str, files: Sequence[Path], given: Mapping[str, Any]) -> list[str]:
    """The words of a command to try after one that ended.

    Args:
      mode, workdir, given: as in `tell`.
      files: that the command wrote.

    Returns:
      The words. A word in capitals stands for a file or folder of the user's. Empty: no command suggests itself.
    """
    match mode:
        case "doctor" | "plan" | "serve":
            return []
        case "prepare":
            return _to_train(workdir, given.get("config", ()))
        case "train":
            return _after_training(workdir)
        case "report":
            has_weights = _is_pipeline(workdir) or newest_step(_folder(workdir)) is not None
            return _to_draw(workdir) if has_weights else []
        case "import" | "compose":
            return _to_draw(workdir)
        case "export":
            return _to_open(workdir, files[0], bool(given.get("adapters")))
        case "evaluate":
            return _after_evaluation(workdir, given)
        case "sample" if given.get("images"):
            return _to_evaluate(workdir, files[0])
        case _:
            return _after_pictures(mode, workdir, given)


def _main(*flags: str) -> list[str]:
    return [*usage.program(), *flags]


def _to_train(workdir: str, config: Sequence[str]) -> list[str]:
    if not config:
        return _main(f"--workdir={workdir}")
    name = Path(config[0].removeprefix("--config=").partition(":")[0]).stem
    return _main(*config, f"--workdir={workdir or f'runs/{name}'}")


def _after_training(workdir: str) -> list[str]:
    history = read_json_lines(_folder(workdir) / workdir_lib.HISTORY)
    if not history or history[-1]["event"] != "finished":
        return []  # the loop has already said how to resume
    match workdir_lib.read_config(workdir).train.objective:
        case "autoencoder":
            return _main("--mode=export", f"--workdir={workdir}", f"--out={_name(workdir)}-diffusers")
        case "clip":
            return _main("--mode=evaluate", f"--workdir={workdir}")
        case _:
            return _to_draw(workdir)


def _to_draw(workdir: str, prompts: Sequence[str] = (), *more: str) -> list[str]:
    """The command that draws with a run or pipeline, with the inputs that its files show it needs.

    Args:
      workdir: of the run.
      prompts: of the user, who may have given none.
      more: further flags.
    """
    first = _first_stage(workdir)
    config, dataset = workdir_lib.read_config(first), workdir_lib.read_dataset(first) or {}
    flags = [f"--workdir={workdir}"]
    if "shown_captions" in dataset:
        flags += [f"--prompt={prompts[0] if prompts else _caption(dataset['shown_captions'])}"]
    if config.model.masked_picture:
        return _main("--mode=inpaint", *flags, "--input=PICTURE.png", "--mask=MASK.png", *more)
    if config.prior.clip and not _is_pipeline(workdir):
        return _main("--mode=compose", f"--stages={workdir},DECODER", f"--workdir={workdir}_pipeline")
    if "imported" in dataset and config.upscale.height:  # whose training pictures are not known
        return _main("--mode=upscale", *flags, "--input=PICTURE.png", *more)
    if "imported" in dataset and config.embedding.clip:
        return _main("--mode=variations", *flags, "--input=PICTURE.png", *more)
    return _main("--mode=sample", *flags, *more)


def _to_open(workdir: str, out: Path, adapters: bool) -> list[str]:
    """The command that opens what was exported."""
    config = workdir_lib.read_config(workdir)
    if adapters:
        base = config.train.init_from
        return _to_draw(base, (), f"--lora={out}") if (_folder(base) / workdir_lib.CONFIG).is_file() else []
    if out.suffix == ".safetensors":
        return _main("--mode=import", f"--source={out}", f"--workdir={workdir}_imported")
    package, name = {
        "autoencoder": ("diffusers", "AutoencoderKL"),
        "clip": ("transformers", "CLIPModel"),
    }.get(config.train.objective, ("diffusers", "DiffusionPipeline"))
    return ["python", "-c", f'from {package} import {name}; print({name}.from_pretrained("{out}"))']


def _to_evaluate(workdir: str, shards: Path) -> list[str]:
    if _is_prior(workdir):
        return _to_draw(workdir)
    against = ["--against=PICTURES"] if _is_imported(workdir) else []
    return _main("--mode=evaluate", f"--workdir={workdir}", f"--generated={shards}", *against)


def _after_evaluation(workdir: str, given: Mapping[str, Any]) -> list[str]:
    if not (_folder(workdir) / workdir_lib.CONFIG).is_file():  # two sets of images were compared
        return []
    config = workdir_lib.read_config(workdir)
    if config.train.objective == "clip":
        is_square = config.data.height == config.data.width  # transformers has no others
        out = f"--out={_name(workdir)}-transformers"
        return _main("--mode=export", f"--workdir={workdir}", out) if is_square else []
    if _is_imported(workdir):
        return _after_pictures("evaluate", workdir, given)
    return _main("--mode=neighbours", f"--workdir={workdir}")


def _after_pictures(mode: str, workdir: str, given: Mapping[str, Any]) -> list[str]:
    prompts = given.get("prompt", ())
    if _is_prior(workdir):
        return _to_draw(workdir)
    if workdir_lib.read_config(workdir).data.channels not in (1, 3):
        return []
    if not serve.missing_packages():
        return _main("--mode=serve", f"--workdir={workdir}", *_loras(given))
    if mode == "sample":
        same = (*(f"--prompt={prompt}" for prompt in prompts[:1]), *_as_asked(given))
        return _main("--mode=progressive", f"--workdir={workdir}", *same)
    return _to_draw(workdir, prompts, *_as_asked(given), f"--seed={(given.get('seed', 0) + 1) % _SEEDS}")


def _as_asked(given: Mapping[str, Any]) -> list[str]:
    """The flags without which the same prompt would draw something else."""
    scale = given.get("guidance_scale")
    if scale is None:
        return _loras(given)
    scales = scale if isinstance(scale, list) else [scale]  # a pipeline may have one for each stage
    return [f"--guidance_scale={','.join(f'{value:g}' for value in scales)}", *_loras(given)]


def _loras(given: Mapping[str, Any]) -> list[str]:
    return [f"--lora={name}" for name in given.get("lora", ())]


def _folder(workdir: str) -> Path:
    return Path(workdir).expanduser()


def _name(workdir: str) -> str:
    return _folder(workdir).resolve().name


def _is_pipeline(workdir: str) -> bool:
    return (_folder(workdir) / workdir_lib.STAGES).is_file()


def _first_stage(workdir: str) -> Path:
    """The folder of the run, or of a pipeline's first stage."""
    folder = _folder(workdir)
    if not _is_pipeline(workdir):
        return folder
    return folder / read_json(folder / workdir_lib.STAGES, None)["stages"][0]["workdir"]


def _is_prior(workdir: str) -> bool:
    """Whether the run draws embeddings, which only a pipeline can turn into pictures."""
    return bool(workdir_lib.read_config(workdir).prior.clip) and not _is_pipeline(workdir)


def _is_imported(workdir: str) -> bool:
    return "imported" in (workdir_lib.read_dataset(workdir) or {})


def _caption(captions: Sequence[str]) -> str:
    """One of the training captions, on one line and not too long."""
    known = [caption for caption in captions if caption.strip()]
    return textwrap.shorten(known[len(known) // 2], _LONGEST_PROMPT, placeholder="") if known else _PROMPT


def _quoted(word: str) -> str:
    """A word as a shell takes it, with the quotes around a flag's value alone."""
    name, equals, value = word.partition("=")
    is_flag = equals and name.startswith("--")
    return f"{name}={shlex.quote(value) if value else ''}" if is_flag else shlex.quote(word)
