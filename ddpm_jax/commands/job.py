"""What the modes share: the run and its sampling options, pictures that exist, and where the result goes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddpm_jax import workdir
from ddpm_jax.data.sources import Fit, Source, open_picture
from ddpm_jax.errors import UserError, first_line
from ddpm_jax.progress import ProgressBar
from ddpm_jax.run import Run
from ddpm_jax.training.loop import open_images

IMAGES_A_ROW = 8


@dataclasses.dataclass(frozen=True)
class Job:
    """What a mode is told whatever it does.

    Attributes:
      run: of `ddpm_jax.load`.
      folder: its workdir.
      seed: of all noise.
      out: where to write; None: a name in the workdir's samples/.
      options: further ones of `Run.sample`: sampler, num_steps, labels, guidance_scale, ...
    """

    run: Run
    folder: Path
    seed: int = 0
    out: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def target(self, what: str, suffix: str) -> "Target":
        """Where the result of a mode goes; `what` begins the file's name in samples/."""
        chosen = "".join(f"_{self.options[name]}" for name in ("sampler", "num_steps") if name in self.options)
        name = f"{what}step_{self.run.step:08d}_seed_{self.seed}{chosen}{suffix}"
        path = Path(self.out).expanduser() if self.out else self.folder / "samples" / name
        if suffix and path.suffix != suffix:
            raise UserError(f"--out is {str(path)!r}; it must end in {suffix}")
        if suffix and path.is_dir():
            raise UserError(f"--out is {str(path)!r}, which is a folder")
        workdir.check_writable(path.parent, "the folder of --out" if self.out else "--workdir")
        return Target(self.run, path)

    def options_from(self, t: int) -> dict[str, Any]:
        """The options, num_steps at most the timesteps from t on."""
        steps = self.options.get("num_steps")
        return {**self.options, **({} if steps is None else {"num_steps": min(steps, t + 1)})}

    def pictures(self, names: Sequence[str], least: int = 1, most: int | None = None) -> np.ndarray:
        """uint8 [N, H, W, C] of --input: files, cropped and scaled to the run's size, and "data:17", the 17th training
        image."""
        height, width, channels = self.run.shape
        fit, source = Fit(height, width, channels), None
        pictures = []
        for name in check_count("input", names, least, most):
            kind, _, number = name.partition(":")
            if kind == "data":
                (index,) = parse_numbers("input", [number])
                source = source or training_images(self.run)
                if not 0 <= index < len(source):
                    raise UserError(f"--input has {name!r}; the data set has the images 0 to {len(source) - 1}")
                pictures.append(source[index]["image"])
                continue
            pictures.append(open_flag("input", name, fit))
        return np.stack(pictures)


@dataclasses.dataclass(frozen=True)
class Target:
    """Where the pictures of a mode go."""

    run: Run
    path: Path

    def done(self, write: Callable[[Path], Any], *others: Path) -> Path:
        """Writes by process 0, and says what was written."""
        if jax.process_index() == 0:
            write(self.path)
            print(f"{self.run.weights}: {', '.join(map(str, (self.path, *others)))}")
        return self.path


def calls_bar(description: str) -> ProgressBar:
    """Of the network's calls, which turn out to be so many on the way."""
    return ProgressBar(f"{description}, calls", 0, enabled=jax.process_index() == 0)


def training_images(run: Run) -> Source:
    """The images that a run learned from; UserError if they are not there or not the same."""
    if "imported" in run.dataset:
        raise UserError("this run was imported, so the images that it learned from are not known")
    source = open_images(run.config, run.dataset)
    if source.describe()["fingerprint"] != run.dataset["fingerprint"]:
        raise UserError("the images that this run learned from have changed: their names, sizes or contents differ")
    return source


# Flags.


def parse_numbers(flag: str, values: Sequence[str], kind: Callable[[str], Any] = int) -> list[Any]:
    try:
        return [kind(value) for value in values]
    except ValueError:
        raise UserError(f"--{flag} is {','.join(values)!r}; accepted: numbers such as 0,1,2") from None


def parse_range(flag: str, text: str, sign: str) -> tuple[int, int]:
    """The two numbers of "0-49999" or "0/4"."""
    first, _, last = text.partition(sign)
    if not (first.isdecimal() and last.isdecimal()):
        raise UserError(f"--{flag} is {text!r}; accepted: two numbers such as 0{sign}4")
    return int(first), int(last)


def check_count(flag: str, values: Sequence[str], least: int, most: int | None = None) -> Sequence[str]:
    if len(values) < least or (most is not None and len(values) > most):
        count = f"{least}" if most == least else f"{least} or more" if most is None else f"{least} to {most}"
        raise UserError(f"--{flag} has {len(values)} values; accepted: {count}")
    return values


def open_flag(flag: str, name: str, fit: Fit) -> np.ndarray:
    """The picture of a file that a flag names."""
    try:
        return open_picture(Path(name).expanduser(), fit)
    except Exception as error:  # Pillow's decoders raise many kinds
        raise UserError(f"--{flag} {name!r} cannot be read as a picture: {first_line(error)}") from None
