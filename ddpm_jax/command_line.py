"""What the command line's modes do with a run: library calls that end in files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ddpm_jax import images, shards, workdir
from ddpm_jax.data import neighbours as neighbours_lib
from ddpm_jax.data.sources import Fit, Source, open_picture, open_source
from ddpm_jax.errors import UserError, first_line
from ddpm_jax.evaluation import evaluate as evaluate_lib
from ddpm_jax.evaluation.features import load_inception, train_digits_classifier
from ddpm_jax.files import atomic_path, new_folder
from ddpm_jax.interop import workdirs
from ddpm_jax.progress import ProgressBar
from ddpm_jax.run import Run
from ddpm_jax.training.loop import open_images

Options = Mapping[str, Any]
_IMAGES_A_CLASS, _STAGES = 8, 10


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

    def __init__(
        self,
        run: Run,
        path: str | Path,
        what: str,
        seed: int,
        out: str | None,
        suffix: str,
        options: Options,
    ):
        self.run = run
        chosen = "".join(f"_{options[name]}" for name in ("sampler", "num_steps") if name in options)
        name = f"{what}step_{run.step:08d}_seed_{seed}{chosen}{suffix}"
        self.path = Path(out).expanduser() if out else Path(path).expanduser() / "samples" / name
        if suffix and self.path.suffix != suffix:
            raise UserError(f"--out is {str(self.path)!r}; it must end in {suffix}")
        if suffix and self.path.is_dir():
            raise UserError(f"--out is {str(self.path)!r}, which is a folder")
        workdir.check_writable(self.path.parent, "the folder of --out" if out else "--workdir")

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
    suffix = {"grid": ".png", "png": "", "npz": ".npz"}[output]
    target = _Target(run, path, "", seed, out, suffix, options)
    if output == "png" and target.path.exists() and (not target.path.is_dir() or any(target.path.iterdir())):
        raise UserError(f"--out {str(target.path)!r} is there and not empty; choose a new one")
    if num_images is None:
        num_images = _IMAGES_A_CLASS * len(labels) if labels else run.config.sample.num_images
    with _bar("sampling") as bar:
        pictures = run.sample(num_images, seed, batch_size=batch_size, labels=labels, progress=bar.update, **options)

    def write(path: Path) -> None:
        if output == "grid":
            images.save(path, _grid_by_class(pictures, len(labels)) if labels else images.grid(pictures))
        elif output == "png":
            with new_folder(path, "--out") as temporary:
                for index, picture in enumerate(pictures):
                    images.save(temporary / f"{index:06d}.png", picture)
        else:
            with atomic_path(path) as temporary:
                np.savez_compressed(temporary, image=pictures, label=run.labels_of(range(num_images), labels))

    return target.done(write)


def _grid_by_class(pictures: np.ndarray, classes: int) -> np.ndarray:
    """A row for each class, whose images come in turn; a row that lacks one ends in white."""
    columns = -(-len(pictures) // classes)
    padded = np.full((columns * classes, *pictures.shape[1:]), 255, np.uint8)
    padded[: len(pictures)] = pictures
    return images.grid(np.concatenate([padded[row::classes] for row in range(classes)]), columns=columns)


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
    target = _Target(run, path, "shards_", seed, out, "", options)
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
            (index,) = parse_numbers("input", [number])
            source = source or _training_images(run)
            if not 0 <= index < len(source):
                raise UserError(f"--input has {name!r}; the data set has the images 0 to {len(source) - 1}")
            pictures.append(source[index]["image"])
            continue
        pictures.append(_open("input", name, fit))
    return np.stack(pictures)


def _open(flag: str, name: str, fit: Fit) -> np.ndarray:
    try:
        return open_picture(Path(name).expanduser(), fit)
    except Exception as error:  # Pillow's decoders raise many kinds
        raise UserError(f"--{flag} {name!r} cannot be read as a picture: {first_line(error)}") from None


def _training_images(run: Run) -> Source:
    if "imported" in run.dataset:
        raise UserError("this run was imported, so the images that it learned from are not known")
    source = open_images(run.config, run.dataset)
    if source.describe()["fingerprint"] != run.dataset["fingerprint"]:
        raise UserError("the images that this run learned from have changed: their names, sizes or contents differ")
    return source


def _need(flag: str, values: Sequence[str], least: int, most: int | None = None) -> Sequence[str]:
    if len(values) < least or (most is not None and len(values) > most):
        count = f"{least}" if most == least else f"{least} or more" if most is None else f"{least} to {most}"
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
    target = _Target(run, path, "interpolate_", seed, out, ".png", options)
    T = run.schedule.num_timesteps
    with _bar("interpolating") as bar:
        if latents:
            rows = [run.interpolate_latents(first, second, lambdas, progress=bar.update, **options)]
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
    batch_size: int | None = None,
    seed: int,
    out: str | None,
    options: Options,
) -> Path:
    """Variations of each picture: one row a picture and t, the picture first."""
    pictures = read_pictures(run, _need("input", inputs, 1))
    chosen = parse_numbers("t", ts) or [run.schedule.num_timesteps // 2]
    target = _Target(run, path, "vary_", seed, out, ".png", options)
    count = num_images or _IMAGES_A_CLASS
    rows = []
    with _bar("varying") as bar:
        for t in chosen:
            repeated = pictures.repeat(count, axis=0)
            varied = run.vary(repeated, t, seed, batch_size=batch_size, progress=bar.update, **_fitting(options, t))
            rows += _rows(pictures, varied)
    return target.done(lambda path: images.save(path, images.grid(np.concatenate(rows), columns=count + 1)))


def denoise(
    run: Run,
    path: str | Path,
    *,
    inputs: Sequence[str],
    ts: Sequence[str],
    batch_size: int | None = None,
    seed: int,
    out: str | None,
    options: Options,
) -> Path:
    """Clean pictures of noisy ones: one row a picture, before and after."""
    pictures = read_pictures(run, _need("input", inputs, 1))
    target = _Target(run, path, "denoise_", seed, out, ".png", options)
    given = parse_numbers("t", _need("t", ts, 0, 1))
    t = given[0] if given else run.estimate_t(pictures)
    if not given and jax.process_index() == 0:
        print(f"the noise is estimated to be that of t = {t}")
    with _bar("denoising") as bar:
        clean = run.denoise(pictures, t, seed, batch_size=batch_size, progress=bar.update, **_fitting(options, t))
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
    batch_size: int | None = None,
    seed: int,
    out: str | None,
    options: Options,
) -> Path:
    """Paints anew where the mask is white: one row a picture, the picture without that part first."""
    pictures = read_pictures(run, _need("input", inputs, 1))
    if not mask:
        raise UserError("--mode=inpaint needs --mask: a picture that is white where it shall be painted anew")
    height, width, _ = run.shape
    where = _open("mask", mask, Fit(height, width, 1, background="black"))[..., 0] >= 128
    target = _Target(run, path, "inpaint_", seed, out, ".png", options)
    count = num_images or _IMAGES_A_CLASS
    with _bar("inpainting") as bar:
        repeated = pictures.repeat(count, axis=0)
        painted = run.inpaint(
            repeated, where, seed, jump=jump, times=times, batch_size=batch_size, progress=bar.update, **options
        )
    masked = np.where(where[..., None], np.uint8(127), pictures)
    table = np.concatenate(_rows(masked, painted))
    return target.done(lambda path: images.save(path, images.grid(table, columns=count + 1)))


# Looking closer.


def progressive(
    run: Run,
    path: str | Path,
    *,
    num_images: int | None,
    num_stages: int | None,
    of: str,
    seed: int,
    out: str | None,
    options: Options,
) -> Path:
    """The way from noise to image: a strip, one row an image, and beside it the same as an animated GIF."""
    target = _Target(run, path, "progressive_", seed, out, ".png", options)
    calls = run.calls(**options)
    if num_stages is not None and num_stages > calls:
        raise UserError(f"--num_stages is {num_stages}; accepted: 2 to {calls}, the calls of the network")
    stages_wanted = min(_STAGES, calls) if num_stages is None else num_stages
    with _bar("sampling") as bar:
        count = num_images or _IMAGES_A_CLASS
        stages = run.progressive(count, seed, num_stages=stages_wanted, of=of, progress=bar.update, **options)
    animation = target.path.with_suffix(".gif")

    def write(path: Path) -> None:
        images.save(path, images.grid(stages.swapaxes(0, 1).reshape(-1, *run.shape), columns=stages_wanted))
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
    target = _Target(run, path, "coarse_to_fine_", seed, out, ".png", options)
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
    target = _Target(run, path, "neighbours_", seed, out, ".png", options)
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
    return target.done(lambda path: images.save(path, images.grid(np.concatenate(rows), columns=found.shape[1] + 1)))


# Judging.


def evaluate(
    run: Run,
    path: str | Path,
    *,
    num_images: int | None,
    features: str,
    against: str,
    generated: str | None,
    batch_size: int | None,
    seed: int,
    options: Options,
) -> dict[str, Any]:
    """Judges samples against real images, and adds the result to evaluation.json and evaluation.md in the workdir.

    Args:
      run, path, seed, batch_size, options: as in `sample`.
      num_images: how many to sample; None: 1,000.
      features: "digits", or the file of FID's Inception.
      against: "data", the images that the run learned from, or a folder, a .npz or a .npy file of images.
      generated: such a folder or file, or a folder of shards, in the place of samples.

    Returns:
      The numbers by name.
    """
    judge = train_digits_classifier() if features == "digits" else load_inception(features)
    folder = workdir.check_writable(path)
    size = batch_size or run.config.sample.batch_size
    real = _image_batches(run, "against", against)
    rest = {name: value for name, value in options.items() if name != "labels"}
    told: dict[str, Any] = {"against": against if against != "data" else f"{run.dataset['source']}, training images"}
    if generated is not None:
        fake = _image_batches(run, "generated", generated)
        told |= {"generated": generated}
    else:
        with _bar("sampling") as bar:
            pictures = run.sample(num_images or 1000, seed, batch_size=size, progress=bar.update, **options)
        fake = iter([pictures])
        told |= run.settings(seed=seed, labels=options.get("labels", ()), batch_size=size, **rest)
    result = evaluate_lib.compare(judge, real, fake, run.mesh, batch_size=size, seed=seed) | told
    if jax.process_index() == 0:
        evaluate_lib.record(folder, result)
        for name, value in result.items():
            if name in told:
                continue
            print(f"{name}: {value:.5g}" if isinstance(value, float) else f"{name}: {value}")
        print(f"{run.weights}: {folder / evaluate_lib.TABLE}")
    return result


def _image_batches(run: Run, flag: str, name: str) -> Iterator[np.ndarray]:
    """uint8 [n, H, W, C] portions of the training images ("data"), of shards, of a folder, or of an array's file."""
    path = Path(name).expanduser()
    shard_files = sorted(path.glob("images_*.npz")) if path.is_dir() else []
    if shard_files:
        return (np.load(file)["image"] for file in shard_files)
    if name == "data":
        source = _training_images(run)
    else:
        height, width, channels = run.shape
        kind = "folder" if path.is_dir() else "array"
        try:
            source = open_source(kind, path=str(path), height=height, width=width, channels=channels)
        except UserError as error:
            raise UserError(f"--{flag}: {error}") from None
    firsts = range(0, len(source), 256)
    return (np.stack([source[i]["image"] for i in range(f, min(f + 256, len(source)))]) for f in firsts)


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
