"""The files that make a workdir a run: its config, the description of its data set, its environment and history."""

import datetime
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax.runtime import lock, processes
from ddpm_jax.runtime.errors import UserError, reason
from ddpm_jax.runtime.files import add_json_line, read_json, read_json_lines, write_text

CONFIG, DATASET, ENVIRONMENT, HISTORY = "config.json", "dataset.json", "environment.json", "history.jsonl"
TOKENIZER, TEXT_ENCODER, AUTOENCODER, CLIP = "tokenizer.json", "text_encoder", "autoencoder", "clip"
BASE = "base"  # the checkpoint of the network whose adapters the run trains
PARTS = (TEXT_ENCODER, AUTOENCODER, CLIP)  # folders of the frozen parts
STAGES = "stages.json"  # of a pipeline
LOCK = "lock.json"
PACKAGES = ("ddpm-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")


def check_writable(workdir: str | Path, what: str = "--workdir") -> Path:
    """Creates the folder if it does not exist; UserError, naming it by `what`, if it is not writable."""
    workdir = Path(workdir).expanduser()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise UserError(f"{what} {str(workdir)!r} cannot be written to: {error.strerror}") from None
    return workdir


@contextmanager
def locked(workdir: str | Path, purpose: str) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Creates the folder if it does not exist, and locks it against other writers for the duration of the block.

    Process 0 of a job holds the lock for all of its processes; if it cannot get it, all end. A lock left behind by a
    killed process is taken over, see `ddpm_jax.runtime.lock`. A folder created here that stays empty is removed.

    Args:
      workdir: of the run.
      purpose: such as "training"; shown to others.

    Yields:
      The folder, and a function that raises UserError if another host has taken over the workdir: call it before
      writing anything that matters.

    Raises:
      UserError: another process is using the workdir, or it cannot be written to.
    """
    was_there = Path(workdir).expanduser().exists()
    folder = check_writable(workdir)
    name = f"--workdir {str(folder)!r}"
    if jax.process_index() != 0:
        processes.meet("workdir")
        yield folder, lambda: None
        return

    def say(text: str) -> None:
        print(f"{name}: {text}", file=sys.stderr, flush=True)

    def check() -> None:
        try:
            held.check()
        except lock.LostError as error:
            raise UserError(
                f"{name} no longer belongs to this process: {error}; nothing more is written, and the other process "
                "resumes from the last checkpoint"
                if error.holder
                else f"{name} no longer belongs to this process: {LOCK} in it was removed; nothing more is written, "
                "and the same command resumes from the last checkpoint"
            ) from None

    try:
        with ExitStack() as stack:
            try:
                held = stack.enter_context(lock.hold(folder / LOCK, purpose, processes=jax.process_count(), say=say))
            except lock.HeldError as error:
                raise UserError(f"{name} is {error}; wait for it to end, or choose another --workdir") from None
            except OSError as error:
                raise UserError(f"{name} cannot be written to: {reason(error)}") from None
            processes.meet("workdir")
            yield folder, check
    finally:
        if not was_there:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def read_config(workdir: str | Path) -> ConfigDict:
    """The config that a run was started with; UserError if the folder is not a workdir."""
    folder = Path(workdir).expanduser()
    path = folder / CONFIG
    if not path.is_file():
        if (folder / "model_index.json").is_file():
            raise UserError(
                f"{str(workdir)!r} is a folder of diffusers, not a workdir; --mode=import --source={workdir} makes one"
            )
        lacking = f"there is no {CONFIG} in it" if folder.is_dir() else f"there is no folder {str(folder.absolute())!r}"
        raise UserError(
            f"{str(workdir)!r} holds no run: {lacking}; training, --mode=import and --mode=compose make one"
        )
    try:
        return config_lib.from_json(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def check_config(workdir: Path, config: ConfigDict) -> None:
    """UserError if the workdir has a run with a different config; it names the fields that differ."""
    if (workdir / STAGES).exists():
        raise UserError(f"--workdir {str(workdir)!r} is a pipeline; its stages are trained in separate workdirs")
    if (workdir / CONFIG).exists():
        changed = config_lib.differences(read_config(workdir), config)
        if changed:
            raise UserError(
                f"--workdir {str(workdir)!r} holds a run with a different config ({'; '.join(changed)}); "
                "use its values or another workdir"
            )


def read_dataset(workdir: str | Path) -> dict[str, Any] | None:
    """The description of the run's training set, or None before training has started.

    With captions it has "tokenizer", the text of a tokenizer.json. The frozen parts of a run are also in the workdir:
    "text_encoder" and "clip" are transformers folders, and "autoencoder" is a diffusers folder.
    """
    folder = Path(workdir).expanduser()
    description: dict[str, Any] | None = read_json(folder / DATASET, None)
    if description is None:
        return None
    if (folder / TOKENIZER).exists():
        description["tokenizer"] = (folder / TOKENIZER).read_text("utf-8")
    for part in PARTS:
        if (folder / part).exists():
            description[part] = str(folder / part)
    return description


def check_dataset(workdir: Path, description: dict[str, Any]) -> None:
    """UserError if the run in the workdir was trained on different images."""
    old = read_dataset(workdir)
    if old and "imported" in old:
        raise UserError(
            f"--workdir {str(workdir)!r} holds weights imported from {old['imported']!r} without an optimiser state; "
            "start another workdir from them with --init_from"
        )
    if old and old["fingerprint"] != description["fingerprint"]:
        raise UserError(
            f"--workdir {str(workdir)!r} holds a run that was trained on different images "
            f"({old['num_images']} then, {description['num_images']} now): their names, sizes or contents have changed"
        )


def is_finished(workdir: Path, config: ConfigDict) -> bool:
    """Whether the run in the workdir finished with exactly this config, and nothing has happened since."""
    history = read_json_lines(workdir / HISTORY)
    if not history or history[-1]["event"] != "finished":
        return False
    return config_lib.to_json(read_config(workdir)) == config_lib.to_json(config)


def record(workdir: Path, config: ConfigDict, description: dict[str, Any]) -> None:
    """Writes the config, the description of the data, and the environment; the tokenizer has its own file, and the
    frozen parts have folders."""
    write_text(workdir / CONFIG, config_lib.to_json(config))
    if "tokenizer" in description:
        write_text(workdir / TOKENIZER, description["tokenizer"])
    rest = {name: value for name, value in description.items() if name not in ("tokenizer", *PARTS)}
    write_text(workdir / DATASET, json.dumps(rest, indent=2) + "\n")
    write_text(workdir / ENVIRONMENT, json.dumps(environment(), indent=2) + "\n")


def keep_part(workdir: Path, part: str, known: Mapping[str, Any] | None, write: Callable[[Path], object]) -> str:
    """Keeps a frozen part of a run in its workdir, so that sampling needs nothing else.

    Args:
      workdir: of the run.
      part: one of PARTS.
      known: the description of the data from an earlier start of the run, which has kept the part if it names it.
      write: writes the part to a new folder; called in process 0.

    Returns:
      The folder.
    """
    folder = workdir / part
    if part not in (known or {}):
        if jax.process_index() == 0:
            shutil.rmtree(folder, ignore_errors=True)  # from a start that was interrupted before writing a description
            write(folder)
        processes.meet(part)
    return str(folder)


def note(workdir: Path, event: str, step: int, **values: Any) -> None:
    """Adds an event to a run's history: "started", "stopped", "finished" or "failed".

    A run whose last event is a start was interrupted.

    Args:
      workdir: of the run.
      event: its name.
      step: of the checkpoint from which the run resumes.
      values: further facts, as JSON values.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    add_json_line(workdir / HISTORY, {"event": event, "step": step, "time": now, **values})


def environment() -> dict[str, Any]:
    """Versions, git revision and devices."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "git_revision": _git_revision(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
    }


def _git_revision() -> str | None:
    """The commit of the source tree, with "-dirty" if it was changed; None outside a git checkout."""

    def git(*args: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(("git", *args), cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
