"""A check of this machine: packages, devices, disks and, if given, a run."""

import dataclasses
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from packaging.requirements import Requirement

from ddpm_jax import config as config_lib
from ddpm_jax.commands import cores
from ddpm_jax.data.dataset import source_arguments
from ddpm_jax.data.prepared import check_network, prepared_name, tfds_folder
from ddpm_jax.data.sources import open_source
from ddpm_jax.evaluation.features import INCEPTION_FILE
from ddpm_jax.runtime import files, lock, workdir
from ddpm_jax.runtime.checkpoints import Checkpoints
from ddpm_jax.runtime.errors import UserError, first_line
from ddpm_jax.runtime.parallel import mesh_shape
from ddpm_jax.validation import validate

OK, WARNING, WRONG = "ok", "warning", "wrong"
_GIB = 2**30
_FEW_GIB = 5.0  # of a disk
_EXTRAS = ("cuda", "cuda12", "tpu", "tensorflow", "wandb", "serve", "test", "dev", "peers", "docs")
_PLUGINS = {"cuda": "jax-cuda13-plugin", "cuda12": "jax-cuda12-plugin", "tpu": "libtpu"}  # of jax, by extra
_TOLD = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "CUDA_VISIBLE_DEVICES", "TFDS_DATA_DIR")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
      level: "ok"; "warning", for what will be slow or may fail; or "wrong", for what will fail.
      subject: what was checked.
      text: what was found and, unless it is ok, what to do about it.
    """

    level: str
    subject: str
    text: str


def doctor(config: ConfigDict | None, workdir: str) -> None:
    """Prints what the machine has and what would fail on it.

    Args:
      config: of a run that is to be started; None: the one in the workdir, if there is one.
      workdir: of a run, or of one that is to be started; "": none.

    Raises:
      UserError: something would fail.
    """
    folder = Path(workdir).expanduser() if workdir else None
    wrong = 0
    for finding in examine(config, folder):
        print(f"{finding.level:8} {finding.subject:12} {finding.text}", flush=True)
        wrong += finding.level == WRONG
    if wrong:
        raise UserError(f"{wrong} problem{'s' * (wrong > 1)} found; see the lines that begin with {WRONG!r}")


def examine(config: ConfigDict | None, folder: Path | None) -> Iterator[Finding]:
    """Checks one thing after another."""
    yield _python()
    yield from _packages()
    yield from _devices()
    yield from _environment()
    yield from _disks(folder)
    yield from _weights()
    if folder is not None:
        yield from _workdir(folder)
        if config is None and (folder / workdir.CONFIG).exists():
            config = workdir.read_config(folder)
    if config is not None:
        yield from _config(config, folder)


def _python() -> Finding:
    memory = ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f", {_size(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))} of memory"
    found = f"Python {platform.python_version()}, {platform.platform()}, {cores.available()} cores{memory}"
    return Finding(OK, "machine", found)


def _packages() -> Iterator[Finding]:
    """The versions of the packages that this one requires, compared with its lower bounds."""
    try:
        needs = [Requirement(text) for text in importlib.metadata.requires("ddpm-jax") or ()]
    except importlib.metadata.PackageNotFoundError:
        yield Finding(WARNING, "packages", "ddpm-jax is not installed, so its needs are unknown: pip install -e .")
        return
    found = {}
    for need in needs:
        if need.marker is None:
            found[need.name] = version = _version(need.name)
            if version is None or not need.specifier.contains(version, prereleases=True):
                yield Finding(WRONG, "packages", f"{need} is required; found: {version}; pip install -U '{need}'")
    shown = [name for name in workdir.PACKAGES if name != "ddpm-jax"]
    yield Finding(OK, "packages", ", ".join(f"{name} {_version(name)}" for name in shown))
    if _version("jax") != _version("jaxlib"):
        text = f"jax {_version('jax')} and jaxlib {_version('jaxlib')} differ; pip install -U jax updates both"
        yield Finding(WARNING, "packages", text)
    there = []
    for extra in _EXTRAS:
        names = [need.name for need in needs if need.marker is not None and need.marker.evaluate({"extra": extra})]
        names = [_PLUGINS.get(extra, "")] if names == ["jax"] else names
        if names and all(map(_version, names)):
            there.append(extra)
    yield Finding(OK, "extras", ", ".join(there) or "none")


def _devices() -> Iterator[Finding]:
    try:
        devices = jax.local_devices()
    except RuntimeError as error:
        yield Finding(WRONG, "devices", f"jax finds no device: {first_line(error)}")
        return
    for device in devices:
        limit = (device.memory_stats() or {}).get("bytes_limit")
        memory = f", {_size(limit)} for jax" if limit else ""
        try:
            worked = float(jax.device_put(jnp.ones((256, 256)), device).sum()) == 256**2
        except Exception as error:  # drivers raise many kinds
            yield Finding(WRONG, "devices", f"{device} cannot compute: {first_line(error)}")
            continue
        level, text = (OK, "computes") if worked else (WRONG, "computes wrong results")
        yield Finding(level, "devices", f"{device}, {device.device_kind}{memory}: {text}")
    if devices[0].platform == "cpu":
        for name, signs, extras in (
            ("An NVIDIA GPU", ("/dev/nvidia0", "/proc/driver/nvidia/version"), ("cuda", "cuda12")),
            ("A TPU", ("/dev/accel0", "/dev/vfio/0"), ("tpu",)),
        ):
            if any(Path(sign).exists() for sign in signs):
                is_there = any(_version(_PLUGINS[extra]) for extra in extras)
                advice = "see the log of jax" if is_there else f"pip install -e '.[{extras[0]}]'"
                yield Finding(WARNING, "devices", f"{name} seems to be present, but jax does not use it: {advice}")
        text = "no GPU or TPU: digits train in minutes, a 32x32 run takes days (--mode=plan --config=... says how many)"
        yield Finding(WARNING, "devices", text)


def _environment() -> Iterator[Finding]:
    told = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_TOLD)}
    if told:
        yield Finding(OK, "environment", ", ".join(f"{name}={value}" for name, value in told.items()))


def _disks(folder: Path | None) -> Iterator[Finding]:
    import tensorflow_datasets as tfds

    if folder is not None:
        yield _disk("workdir", folder)
    yield _disk("data sets", Path(os.environ.get("TFDS_DATA_DIR") or tfds.core.constants.DATA_DIR).expanduser())
    yield _disk("cache", files.user_cache())
    compiled = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if not compiled:
        yield Finding(WARNING, "compiled", "compiled programs are not kept, so every start compiles them again")
    else:
        sizes = [path.stat().st_size for path in Path(compiled).glob("*") if path.is_file()]
        count = f"{len(sizes)} program{'s' * (len(sizes) != 1)}"
        yield Finding(OK, "compiled", f"{count}, {_size(sum(sizes))} of at most 4 GiB, in {compiled}")


def _disk(subject: str, folder: Path) -> Finding:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK) or not there.is_dir():
        return Finding(WRONG, subject, f"{folder} cannot be written to: {there} is not a folder, or not writable")
    level = OK if free >= _FEW_GIB * _GIB else WARNING
    return Finding(level, subject, f"{folder}, {_size(free)} free")


def _weights() -> Iterator[Finding]:
    cache = files.user_cache()
    if any(cache.glob("pt_inception-*")):
        yield Finding(OK, "inception", f"FID's network is in {cache}")
    else:
        text = f"FID's network is not in {cache}; --features=inception downloads {INCEPTION_FILE} (91 MiB) once"
        yield Finding(OK, "inception", text)


def _workdir(folder: Path) -> Iterator[Finding]:
    yield from _lock(folder)
    if not (folder / workdir.CONFIG).exists():
        yield Finding(OK, "run", f"no run in {folder} yet" if folder.exists() else f"{folder} does not exist yet")
        return
    checkpoints = Checkpoints(folder, read_only=True)
    steps = checkpoints.steps()
    checkpoints.close()
    if not steps:
        yield Finding(WARNING, "run", "there is no checkpoint yet; the same command starts over")
        return
    size = sum(path.stat().st_size for path in (checkpoints.directory / str(steps[-1])).rglob("*") if path.is_file())
    yield Finding(OK, "run", f"checkpoints of the steps {', '.join(map(str, steps))}, {_size(size)} each")
    free = shutil.disk_usage(folder).free
    if free < 2 * size:
        text = f"the disk has {_size(free)} left, but a checkpoint takes {_size(size)} before an old one is deleted"
        yield Finding(WRONG, "run", text)
    aside = sorted(path.name for path in (folder / "corrupt").glob("*"))
    if aside:
        yield Finding(WARNING, "run", f"checkpoints that could not be read were set aside: step {', '.join(aside)}")


def _lock(folder: Path) -> Iterator[Finding]:
    """Which process trains in the workdir, or was killed while it did."""
    holder = lock.read(folder / workdir.LOCK)
    if holder is None:
        return
    alive = holder.is_alive()
    if alive is None:
        wait = f"the next start waits {holder.silence:.0f} s for a heartbeat to find out"
        text = f"by {holder}, if it is still alive; {wait}"
        yield Finding(WARNING, "in use", text)
    elif alive:
        yield Finding(WARNING, "in use", f"by {holder}; no other process can train there until it ends")
    else:
        yield Finding(OK, "in use", f"by no process; {holder} was killed, and the next start takes over")


def _config(config: ConfigDict, folder: Path | None) -> Iterator[Finding]:
    data = config.data
    try:
        validate(config, jax.device_count())
        if folder is not None:
            workdir.check_config(folder, config)
        name = prepared_name(data.source, data.name)
        if name:  # nothing is downloaded: it may be many gigabytes
            place, is_there = tfds_folder(name, data.data_dir or None)
            if not is_there:
                check_network(name, data.data_dir or None)
                if data.data_dir and not Path(data.data_dir).expanduser().exists():
                    yield Finding(WARNING, "data", f"data.data_dir {data.data_dir!r} does not exist yet")
            text = f"{name} is prepared in {place}" if is_there else f"{name} will be prepared in {place}"
            yield Finding(OK, "data", text)
        else:
            source = open_source(data.source, **source_arguments(config))
            yield Finding(OK, "data", f"{len(source):,} images of {'x'.join(map(str, source.shape))}")
    except UserError as error:
        yield Finding(WRONG, "config", str(error))
        return
    count = sum(x.size for x in jax.tree.leaves(config_lib.make_model(config).param_shapes()))
    copies = 4 + len(config.train.ema_decays)  # the parameters, their gradient, Adam's two moments, the averages
    text = f"{count:,} parameters; {_size(4 * count * copies)} with gradient, averages and Adam's moments, on "
    sharded = mesh_shape(jax.device_count(), **config.mesh)[1]
    yield Finding(OK, "network", text + (f"{sharded} devices together" if sharded > 1 else "each device"))
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit and 4 * count * copies / sharded > limit:
        yield Finding(WRONG, "network", "that is more than a device has: --config.mesh.fsdp=-1 divides it among all")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _size(size: float) -> str:
    return f"{size / _GIB:,.1f} GiB" if size >= _GIB else f"{size / 2**20:,.0f} MiB"
