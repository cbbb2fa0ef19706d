"""What the modes share: the run with its sampling options, the pictures to edit, and where the result goes."""

import dataclasses
import functools
import json
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddpm_jax import __version__, report
from ddpm_jax.data.pictures import Fit, open_picture
from ddpm_jax.run import Run
from ddpm_jax.runtime import images, workdir
from ddpm_jax.runtime.errors import UserError, reason
from ddpm_jax.runtime.progress import ProgressBar

IMAGES_A_ROW = 8
# The options of `Run.sample` whose flags have other names.
FLAG_OF = {"labels": "classes", "prompts": "prompt", "negative_prompts": "negative_prompt"}


@dataclasses.dataclass(frozen=True)
class Job:
    """The arguments that all modes with a run share.

    Attributes:
      run: of `ddpm_jax.load`.
      folder: its workdir.
      seed: of all noise.
      out: where to write; None: a file in the workdir's samples/.
      options: of `Run.sample`: sampler, num_steps, labels, guidance_scale, ...
      told: the flags that decide the result, for the file's name in samples/: {flag: its value as text}.
    """

    run: Run
    folder: Path
    seed: int = 0
    out: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    told: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def target(self, what: str, suffix: str) -> "Target":
        """Where the result of a mode goes. The file's name in samples/ begins with `what` and holds the flags that
        decide the result, so that different commands write different files."""
        name = f"{what}step_{self.run.step:08d}_seed_{self.seed}{_in_a_name(self.told)}{suffix}"
        path = Path(self.out).expanduser() if self.out else self.folder / "samples" / name
        if suffix == ".png":
            self.check_pictures()
        if suffix and path.suffix != suffix:
            raise UserError(f"--out is {str(path)!r}; it must end in {suffix}")
        if suffix and path.is_dir():
            raise UserError(f"--out is {str(path)!r}, which is a folder")
        workdir.check_writable(path.parent, "the folder of --out" if self.out else "--workdir")
        return Target(self, path)

    def text(self, number: int | None = None) -> dict[str, str]:
        """The text chunks of a PNG, by keyword: "Software"; "Description", the prompts; "parameters", in the format of
        AUTOMATIC1111's web UI, which many tools read; and "settings", JSON.

        Args:
          number: the image's, if it has a file of its own; None: of a grid, which may have several prompts.
        """
        settings = dict(self._settings)
        wanted, unwanted = (self.options.get(name, ()) for name in ("prompts", "negative_prompts"))
        if number is not None:
            wanted, unwanted = (texts[number % max(len(texts), 1) :][:1] for texts in (wanted, unwanted))
            settings["index"] = number
        lines = [*wanted, *(f"Negative prompt: {text}" for text in unwanted), self._facts]
        return {
            "Software": f"ddpm_jax {__version__}",
            **({"Description": "\n".join(wanted)} if wanted else {}),
            "parameters": "\n".join(lines),
            "settings": json.dumps(settings),
        }

    @functools.cached_property
    def _facts(self) -> str:
        height, width, _ = self.run.shape
        facts = {
            "Steps": self.run.calls(**self.options),
            "Sampler": self._settings["sampler"],
            "CFG scale": self._settings["guidance_scale"],
            "Seed": self.seed,
            "Size": f"{width}x{height}",
            "Model": f"{self.folder.resolve().name}, {self.run.weights}",
        }
        return ", ".join(f"{name}: {value}" for name, value in facts.items())

    @functools.cached_property
    def _settings(self) -> dict[str, Any]:
        told = {name: value for name, value in self.told.items() if name not in (*FLAG_OF.values(), "lora")}
        return {**told, **self.run.settings(seed=self.seed, **self.options)}

    def check_pictures(self) -> None:
        """UserError if the run's images cannot be written as pictures."""
        channels = self.run.shape[-1]
        if channels not in (1, 3):
            raise UserError(
                f"this run's images have {channels} channels, but pictures have 1 or 3; accepted: --mode=sample "
                "--output=npz"
            )

    def pictures(self, names: Sequence[str], least: int = 1, most: int | None = None) -> np.ndarray:
        """uint8 [N, H, W, C] of --input, see `Run.pictures`."""
        try:
            return self.run.pictures(*check_count("input", names, least, most))
        except UserError as error:
            raise UserError(f"--input {error}" if str(error).startswith("'") else str(error)) from None


@dataclasses.dataclass(frozen=True)
class Target:
    """The file or folder that a job writes."""

    job: Job
    path: Path

    def save(self, grid: np.ndarray) -> Path:
        """Writes a PNG with the job's text chunks; returns its path."""
        return self.done(lambda path: images.save(path, grid, self.job.text()))

    def done(self, write: Callable[[Path], Any]) -> Path:
        """Calls `write` with the path in process 0, and updates the run's report; returns the path."""
        if jax.process_index() == 0:
            write(self.path)
            if (self.job.folder / workdir.CONFIG).exists():
                report.update(self.job.folder)
        return self.path


def calls_bar(description: str) -> ProgressBar:
    """A bar of network calls, whose total is only known once they begin."""
    return ProgressBar(f"{description}, calls", 0, enabled=jax.process_index() == 0)


# Flags.


def _in_a_name(told: Mapping[str, str]) -> str:
    """Values of flags as a part of a file's name, at most 100 characters long and different for different values."""
    text = "".join(f"_{value}" if name == "sampler" else f"_{name}_{value}" for name, value in told.items())
    if len(text) <= 100 and re.fullmatch(r"(data:|[\w.,-])*", text, re.ASCII):
        return text.replace(",", "+").replace(":", "-")
    plain = re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII)
    return f"{plain[:80]}_{zlib.crc32(text.encode()):08x}"


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


def parse_loras(values: Sequence[str]) -> list[tuple[str, float]]:
    """The (file, weight) pairs of "file", whose weight is 1, or "file:0.7"."""
    found = []
    for value in values:
        name, colon, weight = value.rpartition(":")
        if not colon or Path(value).expanduser().exists():
            name, weight = value, "1"
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not name or not math.isfinite(number):
            raise UserError(
                f"--lora is {value!r}; accepted: a file, or a file and its weight such as mine.safetensors:0.7"
            )
        found.append((name, number))
    return found


def check_count(flag: str, values: Sequence[str], least: int, most: int | None = None) -> Sequence[str]:
    if len(values) < least or (most is not None and len(values) > most):
        count = f"{least}" if most == least else f"{least} or more" if most is None else f"{least} to {most}"
        given = f"has {len(values)} values" if values else "is missing"
        raise UserError(f"--{flag} {given}; accepted: {count}")
    return values


def read_lines(flag: str, name: str) -> list[str]:
    """The lines of the text file that a flag names, without blank ones."""
    try:
        lines = [line.strip() for line in Path(name).expanduser().read_text("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"--{flag} {name!r} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"--{flag} {name!r} cannot be read: {reason(error)}") from None
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"--{flag} {name!r} has no lines")
    return lines


def open_flag(flag: str, name: str, fit: Fit) -> np.ndarray:
    """The picture in the file that a flag names."""
    try:
        return open_picture(Path(name).expanduser(), fit)
    except Exception as error:  # Pillow's decoders raise many kinds
        raise UserError(f"--{flag} {name!r} cannot be read as a picture: {reason(error)}") from None
