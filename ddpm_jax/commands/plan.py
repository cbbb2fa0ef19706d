"""What a run costs: its programs compiled for a TPU slice that need not be there, or measured on the devices here."""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.tree_util import Partial
from ml_collections import ConfigDict

from ddpm_jax import config as config_lib
from ddpm_jax import parallel, planning
from ddpm_jax import workdir as workdir_lib
from ddpm_jax.diffusion.samplers import sample
from ddpm_jax.errors import UserError, first_line
from ddpm_jax.evaluation import features, inception
from ddpm_jax.files import write_text
from ddpm_jax.generate import make_model_fn
from ddpm_jax.planning import Chip, Program, Roofline
from ddpm_jax.rng import named_key
from ddpm_jax.training.state import create_state, init_params
from ddpm_jax.training.step import Metrics, make_train_step

FILE = "plan.json"
PROGRAMS = ("train", "sample", "evaluate")
_LADDER = (8, 16, 32, 64, 128, 256)
_FEATURES_BATCH = 64
_NUM_CLASSES = 10  # of a class-conditional run whose images are not looked at
_ENOUGH_IMAGES = 50_000  # that FID is reported with
_MEASURED_CALLS = 10  # of the network, for the sampler's time
_SECONDS, _FEWEST_CALLS = 2.0, 3  # that a measurement takes, at least


@dataclasses.dataclass(frozen=True)
class Task:
    """A program of the run, not yet compiled.

    Attributes:
      title: what a call of it does.
      function: jit-compiled.
      arguments: as `jax.ShapeDtypeStruct`s that lie on the mesh.
      images: how many it makes, learns from or judges in a call.
      calls: how often the network runs in it, one call after the other; costs are told for one of them.
      donates: whether its first arguments come back as its results, to be handed to the next call.
    """

    title: str
    function: jax.stages.Wrapped
    arguments: tuple[Any, ...]
    images: int
    calls: int = 1
    donates: bool = False

    def flops(self) -> float:
        """Of all calls and devices together."""
        return planning.matrix_flops(self.function.trace(*self.arguments).jaxpr)


def plan(config: ConfigDict | None, workdir: str, topology: str | None, programs: Sequence[str]) -> None:
    """Prints what a run costs, and writes it to plan.json of the workdir if there is one.

    Args:
      config: of the run; None: the one that lies in the workdir.
      workdir: of the run; "": none.
      topology: a TPU slice such as "v5e:2x4", to compile for; None: measure on the devices here.
      programs: which of PROGRAMS to plan.

    Raises:
      UserError: no config, one that cannot run, an unknown topology, no libtpu, a program that does not fit.
    """
    config, num_classes = _open(config, workdir)
    for program in programs:
        if program not in PROGRAMS:
            raise UserError(f"--programs has {program!r}; accepted: {', '.join(PROGRAMS)}")
    if topology is None:
        config_lib.validate(config, jax.device_count())
        result = measure(config, parallel.make_mesh(**config.mesh), programs, num_classes)
    else:
        chip, mesh = open_topology(topology, config)
        result = model(config, chip, mesh, topology, programs, num_classes)
    print(table(result))
    if workdir and jax.process_index() == 0:
        write_text(workdir_lib.check_writable(workdir) / FILE, json.dumps(result, indent=2) + "\n")


def _open(config: ConfigDict | None, path: str) -> tuple[ConfigDict, int]:
    """The config, and the number of classes that its data set has."""
    if config is None:
        if not path:
            raise UserError("--mode=plan needs --config, or the --workdir of a run")
        config = workdir_lib.read_config(path)
    known = workdir_lib.read_dataset(path) if path else None
    return config, len(known["class_names"]) if known and "class_names" in known else _NUM_CLASSES


# The programs.


def tasks(config: ConfigDict, mesh: Mesh, names: Sequence[str], num_classes: int, calls: int | None) -> dict[str, Task]:
    """The run's programs of these names on a mesh; `calls`: of sampling, None for the config's."""
    makers: dict[str, Callable[[], Task]] = {
        "train": lambda: train_task(config, mesh, num_classes),
        "sample": lambda: sample_task(config, mesh, num_classes, calls),
        "evaluate": lambda: features_task(config, mesh),
    }
    return {name: makers[name]() for name in names}


def train_task(config: ConfigDict, mesh: Mesh, num_classes: int) -> Task:
    """One training step, whatever the number of steps that the run takes in one dispatch."""
    net, optimizer = config_lib.make_model(config, num_classes), config_lib.make_optimizer(config)
    function = make_train_step(
        net,
        config_lib.make_schedule_from(config),
        optimizer,
        mesh,
        **config_lib.step_options(config),
    )

    def create() -> Any:
        params = init_params(net, _shape(config), config.seed)
        steps = config_lib.history_timesteps(config)
        return create_state(params, optimizer, config.train.ema_decays, num_timesteps=steps)

    state, size = jax.eval_shape(create), config.train.batch_size
    arguments = (
        parallel.laid(state, parallel.state_shardings(mesh, state)),
        _whole(mesh, jax.eval_shape(Metrics.zero)),
        {"image": _rows(mesh, (size, *_shape(config)), np.uint8), "label": _rows(mesh, (size,), np.int32)},
    )
    return Task(f"training step of {size} images", function, arguments, size, donates=True)


def sample_task(config: ConfigDict, mesh: Mesh, num_classes: int, calls: int | None) -> Task:
    """The whole sampling of a batch."""
    net, schedule = config_lib.make_model(config, num_classes), config_lib.make_schedule_from(config)
    options, guidance = config_lib.sampling_options(config), config_lib.guidance_options(config)
    if calls is not None:
        config = config.copy_and_resolve_references()
        config.sample.num_steps = options["num_steps"] = min(calls, schedule.num_timesteps)
    size, in_all = _rounded(config.sample.batch_size, mesh), config_lib.sampling_calls(config, schedule)

    def function(params: Any, numbers: jax.Array, labels: jax.Array | None) -> jax.Array:
        keys = jax.vmap(lambda number: named_key(0, "image", number))(numbers)
        model_fn = make_model_fn(net, params, labels, **guidance)
        return sample(schedule, model_fn, keys, (size, *_shape(config)), **options)

    params = config_lib.param_shapes(config, num_classes)
    numbers = _rows(mesh, (size,), np.int32)
    labels = None if net.num_classes is None else numbers
    arguments = (parallel.laid(params, parallel.state_shardings(mesh, params)), numbers, labels)
    jitted = jax.jit(function, out_shardings=parallel.batch_sharding(mesh))
    return Task(f"network call of sampling {size} images", jitted, arguments, size, in_all)


def features_task(config: ConfigDict, mesh: Mesh) -> Task:
    """Features of generated images, by Inception or, of the embedded digits, their classifier."""
    shape, size = _shape(config), _rounded(_FEATURES_BATCH, mesh)
    if shape == (8, 8, 1):
        name, apply = "digits classifier", features.train_digits_classifier().apply
    else:
        name, net = "Inception", inception.InceptionV3()
        shape = (*shape[:2], 3)
        variables = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, *shape), jnp.uint8))
        apply = Partial(net.apply, variables)
    arguments = (_whole(mesh, apply), _rows(mesh, (size, *shape), np.uint8))
    function = jax.jit(functools.partial(features.judge, mesh=mesh))
    return Task(f"features of {size} images by {name}", function, arguments, size)


def _shape(config: ConfigDict) -> tuple[int, int, int]:
    return config.data.height, config.data.width, config.data.channels


def _rounded(size: int, mesh: Mesh) -> int:
    """As batches are: up to a multiple of the devices."""
    return -(-size // mesh.devices.size) * mesh.devices.size


def _rows(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=parallel.batch_sharding(mesh))


def _whole(mesh: Mesh, tree: Any) -> Any:
    whole = parallel.replicated(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), tree)


# Compiled for a machine that is not here.


def open_topology(name: str, config: ConfigDict) -> tuple[Chip, Mesh]:
    """The chip and the run's mesh of a TPU slice; UserError if there is no such slice or no compiler for it."""
    found = re.fullmatch(rf"({'|'.join(planning.TPUS)}):(\d+(?:x\d+){{1,2}})", name)
    if not found:
        raise UserError(
            f"--topology is {name!r}; accepted: a TPU ({', '.join(planning.TPUS)}) and its chips, such as v5e:2x4 or "
            "v4:2x2x2"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("--topology needs TPUs' compiler, which is not installed: pip install 'ddpm-jax[tpu]'")
    version, chips = found[1], math.prod(int(n) for n in found[2].split("x"))
    # Set before anything asks jax for a device. Without these the compiler looks for a machine that it runs on, and
    # keeps others from being planned at the same time.
    accelerator = {"v5e": f"v5litepod-{chips}", "v6e": f"v6e-{chips}"}.get(version, f"{version}-{2 * chips}")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": accelerator}
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot read what it keeps of programs for a TPU
    config_lib.validate(config, chips)
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # whatever the plugin has to say
        raise UserError(f"--topology is {name!r}, which libtpu does not know: {first_line(error)}") from None
    shape = parallel.mesh_shape(len(devices), **config.mesh)
    return planning.TPUS[version], Mesh(
        np.array(devices).reshape(shape), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2
    )


def model(
    config: ConfigDict, chip: Chip, mesh: Mesh, topology: str, names: Sequence[str], num_classes: int
) -> dict[str, Any]:
    """The costs of the programs as the compiler makes them for these chips."""
    chips = mesh.devices.size
    result: dict[str, Any] = _header(config, num_classes, chips) | {
        "kind": "model",
        "topology": topology,
        "chip": dataclasses.asdict(chip),
        "programs": {},
    }
    for name, task in tasks(config, mesh, names, num_classes, calls=None).items():
        program, seconds = _compiled(task, mesh, f"{topology}, {chips} x {chip.name}")
        bounds = _bounds(chip, program)
        result["programs"][name] = {
            "title": task.title,
            "images": task.images,
            "calls": task.calls,
            "compile_seconds": round(seconds, 1),
            **dataclasses.asdict(program),
            **dataclasses.asdict(bounds),
            "seconds": bounds.seconds,
            "bound": bounds.bound,
        }
        if name == "train" and chips > 1:
            result["ladder"] = _ladder(config, chip, program, mesh)
    return result | {"run": _run(config, result)}


def _compiled(task: Task, mesh: Mesh, where: str) -> tuple[Program, float]:
    """One of the task's network calls, and the seconds that compiling took."""
    print(f"compiling for {where}: {task.title} ...", file=sys.stderr, flush=True)
    began = time.monotonic()
    try:
        compiled = task.function.trace(*task.arguments).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        used = re.search(r"[Uu]sed ([\d.]+\w) of ([\d.]+\w) hbm", str(error))
        if used:
            raise UserError(f"{task.title}: does not fit, for it needs {used[1]} of the {used[2]} a chip has") from None
        raise UserError(f"{task.title}: the compiler refuses it: {first_line(error)}") from None
    program = planning.analyse(compiled, task.flops() / mesh.devices.size, mesh.shape["fsdp"])
    return program.over(task.calls), time.monotonic() - began


def _bounds(chip: Chip, program: Program) -> Roofline:
    return planning.roofline(chip, program.flops, program.traffic, program.collectives)


def _ladder(config: ConfigDict, chip: Chip, program: Program, mesh: Mesh) -> list[dict[str, Any]]:
    """The training step on slices of other sizes along "data", at a batch that grows with them and at the same one."""
    size, chips, rungs = config.train.batch_size, mesh.devices.size, []
    for count in (count for count in _LADDER if count % mesh.shape["fsdp"] == 0):
        factor = count / chips
        collectives = planning.on_more_chips(program.collectives, factor)
        batches = {round(size * factor): 1.0} if (size * factor).is_integer() else {}
        if size % count == 0:
            batches.setdefault(size, 1 / factor)
        for batch, share in batches.items():  # of the compiled program's examples a chip
            traffic = program.state_traffic + share * (program.traffic - program.state_traffic)
            bounds = planning.roofline(chip, share * program.flops, traffic, collectives)
            how = "compiled" if count == chips else "same program" if share == 1 else "estimated"
            rungs.append({"chips": count, "batch": batch, "how": how, **_speed(config, bounds.seconds, batch, count)})
            rungs[-1] |= dataclasses.asdict(bounds) | {"bound": bounds.bound}
    return rungs


# Measured here.


def measure(config: ConfigDict, mesh: Mesh, names: Sequence[str], num_classes: int) -> dict[str, Any]:
    """The time of the programs on the devices of the mesh, with random weights and images."""
    chip = planning.chip_of(jax.devices()[0].device_kind)
    result: dict[str, Any] = _header(config, num_classes, mesh.devices.size) | {
        "kind": "measurement",
        "device": jax.devices()[0].device_kind,
        "chip": dataclasses.asdict(chip) if chip else None,
        "programs": {},
    }
    plain = config.copy_and_resolve_references()
    plain.model.remat = "none"  # what is computed twice is no part of the model's arithmetic
    as_written = tasks(plain, mesh, names, num_classes, _MEASURED_CALLS)
    for name, task in tasks(config, mesh, names, num_classes, _MEASURED_CALLS).items():
        flops = as_written[name].flops() / task.calls / mesh.devices.size
        compiling, seconds = _timed(task)
        result["programs"][name] = {
            "title": task.title,
            "images": task.images,
            "calls": task.calls,
            "compile_seconds": round(compiling, 1),
            "flops": flops,
            "seconds": seconds,
            "utilisation": flops / seconds / chip.flops if chip else None,
        }
    return result | {"run": _run(config, result)}


def _timed(task: Task) -> tuple[float, float]:
    """Seconds of the first call, and of one of the network's calls after it."""
    print(f"measuring: {task.title} ...", file=sys.stderr, flush=True)
    shardings = jax.tree.map(lambda x: x.sharding, task.arguments)

    def values(x: jax.ShapeDtypeStruct) -> jax.Array:  # random, since products of zeros take less power, and less time
        if x.dtype == jnp.uint8:
            return jax.random.bits(jax.random.key(0), x.shape, jnp.uint8)
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jax.random.uniform(jax.random.key(0), x.shape, x.dtype, maxval=0.02)
        return jnp.zeros(x.shape, x.dtype)

    make = jax.jit(
        lambda: jax.tree.map(values, task.arguments),
        out_shardings=shardings,
        compiler_options=parallel.run_once_options(),
    )
    arguments = make()

    def call() -> None:
        nonlocal arguments
        found = task.function(*arguments)
        if task.donates:
            arguments = (*found, *arguments[len(found) :])
        jax.block_until_ready(found)

    began = time.monotonic()
    call()
    compiling, began, calls = time.monotonic() - began, time.monotonic(), 0
    while calls < _FEWEST_CALLS or time.monotonic() - began < _SECONDS:
        call()
        calls += 1
    return compiling, (time.monotonic() - began) / calls / task.calls


# What it comes to.


def _header(config: ConfigDict, num_classes: int, chips: int) -> dict[str, Any]:
    count = sum(math.prod(p.shape) for p in jax.tree.leaves(config_lib.param_shapes(config, num_classes)))
    data, fsdp = parallel.mesh_shape(chips, **config.mesh)
    return {
        "parameters": count,
        "dtype": config.model.dtype,
        "remat": config.model.remat,
        "batch": config.train.batch_size,
        "steps": config.train.num_steps,
        "chips": chips,
        "mesh": {"data": data, "fsdp": fsdp},
    }


def _run(config: ConfigDict, result: dict[str, Any]) -> dict[str, Any]:
    """What the run takes in all, and 50,000 samples of it."""
    found: dict[str, Any] = {}
    programs, chips = result["programs"], result["chips"]
    if "train" in programs:
        found["train"] = _speed(config, programs["train"]["seconds"], config.train.batch_size, chips)
    calls = config_lib.sampling_calls(config, config_lib.make_schedule_from(config))
    for name, times in (("sample", calls), ("evaluate", 1)):
        if name in programs:
            batches = -(-_ENOUGH_IMAGES // programs[name]["images"])
            found[name] = {"images": _ENOUGH_IMAGES, "hours": batches * times * programs[name]["seconds"] / 3600}
            found[name]["chip_hours"] = found[name]["hours"] * chips
    return found


def _speed(config: ConfigDict, seconds: float, batch: int, chips: int) -> dict[str, float]:
    """Of training at so many seconds a step: until it has seen as many images as the config's run does."""
    steps = config.train.num_steps * config.train.batch_size / batch
    return {
        "step_seconds": seconds,
        "steps_per_second": 1 / seconds,
        "images_per_second": batch / seconds,
        "days": steps * seconds / 86400,
        "chip_hours": steps * seconds / 3600 * chips,
    }


def table(result: dict[str, Any]) -> str:
    """The plan for people."""
    is_model, mesh = result["kind"] == "model", result["mesh"]
    devices = f"{result['chips']} x {result['chip']['name'] if is_model else result['device']}"
    where = f"{result['topology']}, {devices}" if is_model else devices
    lines = [
        f"{result['parameters']:,} parameters, {result['dtype']}, remat {result['remat']}, batch {result['batch']}, on "
        f"{where}, mesh data {mesh['data']} fsdp {mesh['fsdp']}",
        "A model, not a measurement: what the programs, compiled for these chips, ask of them at their peaks."
        if is_model
        else "Measured here, with random weights and images.",
    ]
    for program in result["programs"].values():
        lines += ["", program["title"], *(_model_lines if is_model else _measured_lines)(program, result["chip"])]
    lines += ["", *_run_lines(result)]
    if "ladder" in result:
        lines += ["", *_ladder_lines(result["ladder"])]
    return "\n".join(lines)


def _model_lines(program: dict[str, Any], chip: dict[str, Any]) -> list[str]:
    lines = [
        _line("arithmetic", _amount(program["flops"], "FLOP"), program["arithmetic"]),
        _line("memory traffic", _amount(program["traffic"], "B"), program["memory"])
        + f"  {_amount(program['xla_traffic'], 'B')} by XLA's count, which has the chip's own memory in it",
        *(_line(f"{c['kind']} of {c['devices']}", _amount(c["bytes"], "B"), None) for c in program["collectives"]),
        _line(f"{program['messages']:.0f} messages", "", program["network"]),
        _line("a call", "", program["seconds"]) + f"  bound by {program['bound']}",
        _line("peak memory", _amount(program["peak_memory"], "B"), None) + f"  of {_amount(chip['memory'], 'B')}",
    ]
    return lines


def _measured_lines(program: dict[str, Any], chip: dict[str, Any] | None) -> list[str]:
    rate = _amount(program["flops"] / program["seconds"], "FLOP/s")
    use = (
        f"  {program['utilisation']:.1%} of the bfloat16 peak: model-FLOP utilisation"
        if chip
        else "  of a peak not known here"
    )
    return [
        _line("arithmetic", _amount(program["flops"], "FLOP"), None),
        _line("a call", rate, program["seconds"]) + use,
    ]


def _line(name: str, amount: str, seconds: float | None) -> str:
    time = "" if seconds is None else f"{1e3 * seconds:.3f} ms"
    return f"  {name:22} {amount:>14} {time:>12}".rstrip()


def _amount(value: float, unit: str) -> str:
    power = min(int(math.log10(value) / 3), 5) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {' kMGTP'[power].strip()}{unit}"


def _run_lines(result: dict[str, Any]) -> list[str]:
    run, lines = result["run"], []
    if "train" in run:
        train = run["train"]
        lines.append(
            f"{result['steps']:,} steps: {train['steps_per_second']:.3g} steps/s, {train['images_per_second']:,.0f} "
            f"images/s, {train['days']:.3g} days, {train['chip_hours']:,.3g} chip-hours"
        )
    for name, what in (("sample", "samples"), ("evaluate", "images judged")):
        if name in run:
            found = run[name]
            lines.append(
                f"{found['images']:,} {what}: {found['hours']:.3g} hours, {found['chip_hours']:.3g} chip-hours"
            )
    return lines


def _ladder_lines(ladder: list[dict[str, Any]]) -> list[str]:
    lines = [
        "The training step on other slices, to as many images as the run's:",
        f"{'chips':>5} {'batch':>6} {'arithmetic':>11} {'memory':>9} {'network':>9} {'steps/s':>8} {'images/s':>9} "
        f"{'days':>7} {'chip-hours':>10}",
    ]
    for rung in ladder:
        times = (f"{1e3 * rung[name]:.2f} ms" for name in ("arithmetic", "memory", "network"))
        lines.append(
            "{:>5} {:>6} {:>11} {:>9} {:>9}".format(rung["chips"], rung["batch"], *times)
            + f" {rung['steps_per_second']:8.3g} {rung['images_per_second']:9,.0f} {rung['days']:7.3g} "
            f"{rung['chip_hours']:10,.4g}  {rung['how']}"
        )
    return [
        *lines,
        "compiled: as above. same program: the compiled one, its all-reduce on more chips. estimated: its arithmetic "
        "and memory traffic by the batch, but for the state's.",
    ]
