"""What the command line's modes do with a run: library calls that end in files."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from ddpm_jax import images, workdir
from ddpm_jax.errors import UserError
from ddpm_jax.files import atomic_path
from ddpm_jax.progress import ProgressBar
from ddpm_jax.run import Run


def sample(
    run: Run,
    path: str | Path,
    *,
    num_images: int | None,
    seed: int,
    num_steps: int | None,
    batch_size: int | None,
    classes: Sequence[str],
    output: str,
    out: str | None,
) -> Path:
    """Samples from a run and writes the images.

    Args:
      run: of `ddpm_jax.load`.
      path: its workdir.
      num_images, seed, num_steps, batch_size: as in `Run.sample`; None: the config's.
      classes: labels, as text.
      output: "grid" (one PNG), "png" (a folder of PNGs) or "npz" (`image` uint8 [N, H, W, C] and `label` int32 [N],
        0 without classes).
      out: the file or folder; None: in the workdir's samples/.

    Returns:
      Where the images are.
    """
    try:
        labels = [int(label) for label in classes]
    except ValueError:
        raise UserError(f"--classes is {','.join(classes)!r}; accepted: numbers such as 0,1,2") from None
    for name, value in (("num_steps", num_steps), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; at least 1 is needed")
    default = Path(path).expanduser() / "samples" / f"step_{run.step:08d}_seed_{seed}"
    suffix = {"grid": ".png", "png": "", "npz": ".npz"}[output]
    target = Path(out).expanduser() if out else default.with_name(default.name + suffix)
    if suffix and target.suffix != suffix:
        raise UserError(f"--out is {str(target)!r}; with --output={output} it must end in {suffix}")
    workdir.check_writable(target if output == "png" else target.parent)

    total = run.config.sample.num_images if num_images is None else num_images
    is_main = jax.process_index() == 0
    with ProgressBar("sampling", total, enabled=is_main) as bar:
        pictures = run.sample(
            total,
            seed,
            num_steps=num_steps,
            batch_size=batch_size,
            labels=labels,
            progress=lambda done, total: bar.update(done),
        )
    if not is_main:
        return target
    if output == "grid":
        images.save(target, images.grid(pictures))
    elif output == "png":
        for index, picture in enumerate(pictures):
            images.save(target / f"{index:06d}.png", picture)
    else:
        classes_in_turn = labels or list(range(run.net.num_classes or 1))
        with atomic_path(target) as temporary:
            np.savez_compressed(temporary, image=pictures, label=np.resize(np.array(classes_in_turn, np.int32), total))
    print(f"step {run.step}, {'raw weights' if run.ema_decay is None else f'EMA {run.ema_decay}'}: {target}")
    return target


def import_weights(source: str | None, path: str | Path) -> Path:
    """Makes a workdir of other weights; see `ddpm_jax.interop.workdirs.import_weights`."""
    from ddpm_jax.interop import workdirs

    if not source:
        raise UserError("--mode=import needs --source: a diffusers folder, a hub name or an exported .safetensors file")
    target = workdirs.import_weights(source, path)
    print(f"{source}: {target}")
    return target


def export_weights(run: Run, out: str | None) -> Path:
    """Writes a run's weights for others; see `ddpm_jax.interop.workdirs.export_weights`."""
    from ddpm_jax.interop import workdirs

    if not out:
        raise UserError("--mode=export needs --out: a folder for diffusers, or a .safetensors file")
    target = workdirs.export_weights(run, out)
    print(f"step {run.step}, {'raw weights' if run.ema_decay is None else f'EMA {run.ema_decay}'}: {target}")
    return target
