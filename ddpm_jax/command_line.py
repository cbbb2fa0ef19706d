"""What the command line's modes do with a run: library calls that end in files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from ddpm_jax import images, shards, workdir
from ddpm_jax.data import neighbours as neighbours_lib
from ddpm_jax.data.sources import Fit, Source
from ddpm_jax.errors import UserError
from ddpm_jax.files import atomic_path
from ddpm_jax.interop import workdirs
from ddpm_jax.progress import ProgressBar
from ddpm_jax.run import Run
from ddpm_jax.training.loop import open_images

Options = Mapping[str, Any]
_IMAGES_A_CLASS = 8


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


def _bar(description: str) -> ProgressBar:
    return ProgressBar(f"{description}, calls", 0, enabled=jax.process_index() == 0)


class _Target:
    """Where a mode's pictures go: `out`, or a name in the workdir's samples/ that says what they are."""

    def __init__(self, run: Run, path: str | Path, what: str, seed: int, out: str | None, suffixes: Sequence[str]):
        self.run = run
        name = f"{what}step_{run.step:08d}_seed_{seed}{suffixes[0]}"
        self.path = Path(out).expanduser() if out else Path(path).expanduser() / "samples" / name
        if self.path.suffix not in suffixes and suffixes[0]:
            raise UserError(f"--out is {str(self.path)!r}; it must end in {' or '.join(suffixes)}")
        workdir.check_writable(self.path.parent if suffixes[0] else self.path)

    def done(self, write: Callable[[Path], Any], *others: Path) -> Path:
        """Writes by process 0, and says what was written."""
        if jax.process_index() == 0:
            write(self.path)
            print(f"{self.run.weights}: {', '.join(map(str, (self.path, *others)))}")
        return self.path


def sample(
    run: Run,
    path: str | Path,
    *,
    num_images: int | None,
    seed: int,
    batch_size: int | None,
    classes: Sequence[str],
    output: str,
    out: str | None,
    options: Options,
) -> Path:
    """Samples from a run and writes the images.

    Args:
      run: of `ddpm_jax.load`.
      path: its workdir.
      num_images, seed, batch_size: as in `Run.sample`; None: the config's, or 8 a class where classes are chosen.
      classes: labels, as text. In a grid each has a row.
      output: "grid" (one PNG), "png" (a folder of PNGs) or "npz" (`image` uint8 [N, H, W, C] and `label` int32 [N],
        0 without classes).
      out: the file or folder; None: in the workdir's samples/.
      options: further ones of `Run.sample`.

    Returns:
      Where the images are.
    """
    labels = parse_numbers("classes", classes)
    target = _Target(run, path, "", seed, out, [{"grid": ".png", "png": "", "npz": ".npz"}[output]])
    if num_images is None:
        num_images = _IMAGES_A_CLASS * len(labels) if labels else run.config.sample.num_images
    with _bar("sampling") as bar:
        pictures = run.sample(num_images, seed, batch_size=batch_size, labels=labels, progress=bar.update, **options)

    def write(path: Path) -> None:
        if output == "grid":
            rows = len(labels)
            ordered = np.concatenate([pictures[row::rows] for row in range(rows)]) if rows else pictures
            images.save(path, images.grid(ordered, columns=-(-num_images // rows) if rows else None))
        elif output == "png":
            for index, picture in enumerate(pictures):
                images.save(path / f"{index:06d}.png", picture)
        else:
            with atomic_path(path) as temporary:
                np.savez_compressed(temporary, image=pictures, label=run.labels_of(range(num_images), labels))

    return target.done(write)


def sample_shards(
    run: Run,
    path: str | Path,
    *,
    first: int,
    last: int,
    seed: int,
    shard_size: int,
    part: tuple[int, int],
    batch_size: int | None,
    classes: Sequence[str],
    out: str | None,
    options: Options,
) -> Path:
    """Images first..last of a seed as .npz files of shard_size; those that are there already are left as they are.

    Args:
      run, path, seed, batch_size, classes, options: as in `sample`.
      first, last: numbers of the first and the last image.
      shard_size: images a file.
      part: (i, n): this process makes every n-th shard from the i-th on, so that n of them share the work.
      out: the folder; None: in the workdir's samples/.

    Returns:
      The folder. Each file has `image` uint8 [N, H, W, C], `label` int32 [N], `index` int64 [N] and `settings`, JSON.
    """
    labels = parse_numbers("classes", classes)
    target = _Target(run, path, "", seed, out, [""])
    settings = run.settings(seed=seed, labels=labels, batch_size=batch_size, **options)
    if not 0 <= part[0] < part[1]:
        raise UserError(f"--part is {part[0]}/{part[1]}; accepted: 0/N to N-1/N")
    todo, there = shards.missing(target.path, first, last, shard_size, settings)
    mine = [span for span in todo if span[0] // shard_size % part[1] == part[0]]
    if there and jax.process_index() == 0:
        print(f"{there} shards are there already")
    with _bar("sampling") as bar:
        for done, (low, high) in enumerate(mine):

            def progress(calls: int, of: int, done: int = done) -> None:
                bar.update(done * of + calls, len(mine) * of)

            indices = range(low, high + 1)
            pictures = run.sample(
                seed=seed, indices=indices, batch_size=batch_size, labels=labels, progress=progress, **options
            )
            if jax.process_index() == 0:
                shards.write(target.path, low, high, pictures, run.labels_of(indices, labels), settings)
    return target.done(lambda path: None)


# Pictures that exist.


def read_pictures(run: Run, names: Sequence[str]) -> np.ndarray:
    """uint8 [N, H, W, C] of files, cropped and scaled to the run's size, and of "data:17", the 17th training image."""
    height, width, channels = run.shape
    fit, source = Fit(height, width, channels), None
    pictures = []
    for name in names:
        kind, _, number = name.partition(":")
        if kind == "data":
            source = source or _training_images(run)
            (index,) = parse_numbers("input", [number])
            if not 0 <= index < len(source):
                raise UserError(f"--input has {name!r}; the data set has the images 0 to {len(source) - 1}")
            pictures.append(source[index]["image"])
            continue
        try:
            with Image.open(Path(name).expanduser()) as image:
                pictures.append(fit(image))
        except OSError as error:
            raise UserError(f"--input {name!r} cannot be read as a picture: {error}") from None
    return np.stack(pictures)


def _training_images(run: Run) -> Source:
    if run.dataset["source"] == "import":
        raise UserError("this run was imported, so the images that it learned from are not known")
    return open_images(run.config, run.dataset)


def _need(flag: str, values: Sequence[str], least: int, most: int | None = None) -> Sequence[str]:
    if len(values) < least or (most is not None and len(values) > most):
        count = f"{least}" if most == least else f"{least} or more"
        raise UserError(f"--{flag} has {len(values)} values; accepted: {count}")
    return values


def interpolate(
    run: Run,
    path: str | Path,
    *,
    inputs: Sequence[str],
    ts: Sequence[str],
    weights: Sequence[str],
    latents: bool,
    seed: int,
    out: str | None,
    options: Options,
) -> Path:
    """Between two pictures: one row a t and one column a weight, or with `latents` one row along DDIM's arc."""
    first, second = read_pictures(run, _need("input", inputs, 2, 2))
    lambdas = parse_numbers("weights", weights, float) or np.linspace(0, 1, 11).tolist()
    target = _Target(run, path, "interpolate_", seed, out, [".png"])
    T = run.schedule.num_timesteps
    with _bar("interpolating") as bar:
        if latents:
            known = {name: options[name] for name in options if name in ("num_steps", "spacing")}
            rows = [run.interpolate_latents(first, second, lambdas, progress=bar.update, **known)]
        else:
            chosen = parse_numbers("t", ts) or [T * eighths // 8 for eighths in range(1, 8)]
            rows = [
                run.interpolate(first, second, lambdas, t, seed, progress=bar.update, **_fitting(options, t))
                for t in chosen
            ]
    # The pictures themselves stand at both ends of each row.
    table = np.concatenate([np.concatenate([first[None], row, second[None]]) for row in rows])
    return target.done(lambda path: images.save(path, images.grid(table, columns=len(lambdas) + 2)))


def _fitting(options: Options, t: int) -> dict[str, Any]:
    """The options, num_steps at most the timesteps from t on."""
    steps = options.get("num_steps")
    return {**options, **({} if steps is None else {"num_steps": min(steps, t + 1)})}


def _rows(first: np.ndarray, rest: np.ndarray) -> list[np.ndarray]:
    """A row for each of the first pictures: it, then its equal share of the rest."""
    return [np.concatenate([f[None], r]) for f, r in zip(first, np.split(rest, len(first)), strict=True)]


def vary(
    run: Run,
    path: str | Path,
    *,
    inputs: Sequence[str],
    ts: Sequence[str],
    num_images: int | None,
    seed: int,
    out: str | None,
    options: Options,
) -> Path:
    """Variations of each picture: one row a picture and t, the picture first."""
    pictures = read_pictures(run, _need("input", inputs, 1))
    chosen = parse_numbers("t", ts) or [run.schedule.num_timesteps // 2]
    target = _Target(run, path, "vary_", seed, out, [".png"])
    count = num_images or _IMAGES_A_CLASS
    rows = []
    with _bar("varying") as bar:
        for t in chosen:
            repeated = pictures.repeat(count, axis=0)
            varied = run.vary(repeated, t, seed, progress=bar.update, **_fitting(options, t))
            rows += _rows(pictures, varied)
    return target.done(lambda path: images.save(path, images.grid(np.concatenate(rows), columns=count + 1)))


def denoise(
    run: Run,
    path: str | Path,
    *,
    inputs: Sequence[str],
    ts: Sequence[str],
    seed: int,
    out: str | None,
    options: Options,
) -> Path:
    """Clean pictures of noisy ones: one row a picture, before and after."""
    pictures = read_pictures(run, _need("input", inputs, 1))
    target = _Target(run, path, "denoise_", seed, out, [".png"])
    given = parse_numbers("t", _need("t", ts, 0, 1))
    t = given[0] if given else run.estimate_t(pictures)
    if not given and jax.process_index() == 0:
        print(f"the noise is estimated to be that of t = {t}")
    with _bar("denoising") as bar:
        clean = run.denoise(pictures, t, seed, progress=bar.update, **_fitting(options, t))
    pairs = np.stack([pictures, clean], axis=1).reshape(-1, *run.shape)
    return target.done(lambda path: images.save(path, images.grid(pairs, columns=2)))


def inpaint(
    run: Run,
    path: str | Path,
    *,
    inputs: Sequence[str],
    mask: str | None,
    jump: int,
    times: int,
    num_images: int | None,
    seed: int,
    out: str | None,
    options: Options,
) -> Path:
    """Paints anew where the mask is white: one row a picture, the picture without that part first."""
    pictures = read_pictures(run, _need("input", inputs, 1))
    if not mask:
        raise UserError("--mode=inpaint needs --mask: a picture that is white where it shall be painted anew")
    height, width, _ = run.shape
    try:
        with Image.open(Path(mask).expanduser()) as image:
            where = Fit(height, width, 1)(image)[..., 0] >= 128
    except OSError as error:
        raise UserError(f"--mask {mask!r} cannot be read as a picture: {error}") from None
    target = _Target(run, path, "inpaint_", seed, out, [".png"])
    count = num_images or _IMAGES_A_CLASS
    with _bar("inpainting") as bar:
        repeated = pictures.repeat(count, axis=0)
        painted = run.inpaint(repeated, where, seed, jump=jump, times=times, progress=bar.update, **options)
    masked = np.where(where[..., None], np.uint8(127), pictures)
    table = np.concatenate(_rows(masked, painted))
    return target.done(lambda path: images.save(path, images.grid(table, columns=count + 1)))


# Looking closer.


def progressive(
    run: Run,
    path: str | Path,
    *,
    num_images: int | None,
    num_stages: int,
    of: str,
    classes: Sequence[str],
    seed: int,
    out: str | None,
    options: Options,
) -> Path:
    """The way from noise to image: a strip, one row an image, and beside it the same as an animated GIF."""
    target = _Target(run, path, "progressive_", seed, out, [".png"])
    labels = parse_numbers("classes", classes)
    with _bar("sampling") as bar:
        count, options = num_images or _IMAGES_A_CLASS, {**options, "num_stages": num_stages, "of": of}
        stages = run.progressive(count, seed, labels=labels, progress=bar.update, **options)
    animation = target.path.with_suffix(".gif")

    def write(path: Path) -> None:
        images.save(path, images.grid(stages.swapaxes(0, 1).reshape(-1, *run.shape), columns=num_stages))
        images.save_animation(animation, np.stack([images.grid(stage) for stage in stages]))

    return target.done(write, animation)


def coarse_to_fine(
    run: Run,
    path: str | Path,
    *,
    num_images: int | None,
    ts: Sequence[str],
    seed: int,
    out: str | None,
    options: Options,
) -> Path:
    """Images that share their x_t: one row a t."""
    T = run.schedule.num_timesteps
    chosen = parse_numbers("t", ts) or [T - 1, T * 3 // 4, T // 2, T // 4]
    target = _Target(run, path, "coarse_to_fine_", seed, out, [".png"])
    count = num_images or _IMAGES_A_CLASS
    with _bar("sampling") as bar:
        rows = [run.coarse_to_fine(count, t, seed, progress=bar.update, **options) for t in chosen]
    return target.done(lambda path: images.save(path, images.grid(np.concatenate(rows), columns=count)))


def neighbours(
    run: Run,
    path: str | Path,
    *,
    num_images: int | None,
    num_neighbours: int,
    seed: int,
    out: str | None,
    options: Options,
) -> Path:
    """Samples and the training images nearest to them, to see memorising: one row a sample, the sample first."""
    source = _training_images(run)
    target = _Target(run, path, "neighbours_", seed, out, [".png"])
    count = num_images or _IMAGES_A_CLASS
    with _bar("sampling") as bar:
        pictures = run.sample(count, seed, progress=bar.update, **options)
    with ProgressBar("comparing", len(source), enabled=jax.process_index() == 0) as bar:
        mirrored = run.config.data.flip
        found, distances = neighbours_lib.nearest(pictures, source, num_neighbours, bar.update, mirrored=mirrored)
    rows = [np.stack([p, *(source[int(i)]["image"] for i in row)]) for p, row in zip(pictures, found, strict=True)]
    if jax.process_index() == 0:
        closest = distances[:, 0]
        print(f"root mean square distance to the nearest: {closest.min():.1f} to {closest.max():.1f} of 255")
    return target.done(lambda path: images.save(path, images.grid(np.concatenate(rows), columns=num_neighbours + 1)))


# Weights of others.


def import_weights(source: str | None, path: str | Path) -> Path:
    """Makes a workdir of other weights; see `ddpm_jax.interop.workdirs.import_weights`."""
    if not source:
        raise UserError("--mode=import needs --source: a diffusers folder, a hub name or an exported .safetensors file")
    target = workdirs.import_weights(source, path)
    print(f"{source}: {target}")
    return target


def export_weights(run: Run, out: str | None) -> Path:
    """Writes a run's weights for others; see `ddpm_jax.interop.workdirs.export_weights`."""
    if not out:
        raise UserError("--mode=export needs --out: a folder for diffusers, or a .safetensors file")
    target = workdirs.export_weights(run, out)
    print(f"{run.weights}: {target}")
    return target
