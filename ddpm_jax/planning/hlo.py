"""The memory traffic and communication of a compiled program, from its HLO text."""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8, "c64": 8}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4}
_ARRAY = re.compile(r"\b(" + "|".join(_BYTES) + r")\[([\d,]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # sizes and order of axes, such as [4,2]T(1,0)
# Operations that move nothing, or whose bytes are counted at their start.
_FREE = {"after-all", "bitcast", "constant", "get-tuple-element", "opt-barrier", "parameter", "partition-id", "tuple"}
_COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all", "reduce-scatter")


@dataclasses.dataclass(frozen=True)
class _Array:
    bytes: int
    on_chip: bool  # in on-chip memory (a TPU's VMEM) instead of HBM


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    arrays: tuple[_Array, ...]
    opcode: str
    arguments: str  # the operands, or a constant's value
    attributes: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind between groups of devices.

    Attributes:
      kind: all-reduce, all-gather, ...
      bytes: of the whole array that is reduced or gathered, on one device.
      devices: number of devices in each group.
      along_data: whether a group includes devices at different positions along the mesh's data axis.
    """

    kind: str
    bytes: float
    devices: int
    along_data: bool = True

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a ring algorithm."""
        share = (self.devices - 1) / self.devices
        return self.bytes * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)


@dataclasses.dataclass(frozen=True)
class Program:
    """What one call of a program demands of each device.

    Attributes:
      flops: of matrix products and convolutions.
      traffic: bytes from and to memory (HBM).
      collectives: its messages, merged by kind and group.
      messages: number of messages.
      peak_memory: bytes of its arguments, results and temporary arrays.
      state_traffic: bytes of the arguments and results, a part of `traffic` that does not depend on the batch.
      xla_traffic: bytes by XLA's own count, which includes on-chip transfers and counts asynchronous ones twice.
    """

    flops: float
    traffic: float
    collectives: tuple[Collective, ...]
    messages: float
    peak_memory: float
    state_traffic: float
    xla_traffic: float

    def over(self, calls: int) -> "Program":
        """The demand of one of `calls` equal sequential parts."""
        return dataclasses.replace(
            self,
            flops=self.flops / calls,
            traffic=self.traffic / calls,
            collectives=tuple(dataclasses.replace(c, bytes=c.bytes / calls) for c in self.collectives),
            messages=self.messages / calls,
        )


def analyse(compiled: jax.stages.Compiled, flops: float, fsdp: int = 1) -> Program:
    """Analyses a compiled program.

    Args:
      compiled: the program.
      flops: one device's share of `matrix_flops`.
      fsdp: size of the mesh's second axis, along which devices are numbered first.
    """
    text = compiled.as_text() or ""
    collectives = parse_collectives(text, fsdp)
    memory: Any = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Program(
        flops=flops,
        traffic=memory_traffic(text),
        collectives=_merged(collectives),
        messages=len(collectives),
        peak_memory=memory.argument_size_in_bytes + results + memory.temp_size_in_bytes,
        state_traffic=state_traffic(text),
        xla_traffic=cost.get("bytes accessed", 0.0),
    )


def memory_traffic(hlo: str) -> float:
    """Bytes that a compiled program moves from and to HBM: the operands and results of its operations stored there.

    Loops count as often as they run; of several branches only the most expensive counts.
    """
    computations, entry = _parse(hlo)
    return _traffic(computations, entry)


def state_traffic(hlo: str) -> float:
    """Bytes of a compiled program's arguments and results, which it moves in any case."""
    computations, entry = _parse(hlo)
    ends = (i for i in computations[entry] if i.opcode == "parameter" or i.is_root)
    return sum(array.bytes for instruction in ends for array in instruction.arrays)


def parse_collectives(hlo: str, fsdp: int = 1) -> list[Collective]:
    """The messages that a compiled program sends, in loops as often as they run; `fsdp` as in `analyse`."""
    computations, entry = _parse(hlo)
    return list(_collectives(computations, entry, fsdp))


Computations = Mapping[str, Sequence[_Instruction]]


def _parse(hlo: str) -> tuple[Computations, str]:
    """The instructions of every computation, and the name of the entry computation."""
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        if line.startswith("}"):
            current = None
        elif current is None:
            found = _COMPUTATION.match(line)
            if found:
                current = computations.setdefault(found[2], [])
                entry = found[2] if found[1] else entry
        elif found := _INSTRUCTION.match(line):
            current.append(_instruction(found[2], found[3], bool(found[1])))
    return computations, entry


def _instruction(name: str, text: str, is_root: bool) -> _Instruction:
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    arrays = [
        _Array(_BYTES[kind] * math.prod(int(n) for n in sizes.split(",") if n), bool(re.search(r"S\([1-9]", layout)))
        for kind, sizes, layout in _ARRAY.findall(shape)
    ]
    return _Instruction(name, tuple(arrays), rest[:opening], rest[opening + 1 : closing - 1], rest[closing:], is_root)


def _closing(text: str, start: int) -> int:
    """One past the bracket that closes the one at `start`."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    raise ValueError(f"no closing bracket in {text[:80]!r}")


def _called(computations: Computations, instruction: _Instruction) -> tuple[list[str], int]:
    """The computations that an instruction may call, and how often; only the most expensive one counts."""
    attributes = instruction.attributes
    if instruction.opcode == "while":
        return re.findall(r"\bbody=%?([\w.\-]+)", attributes), _trips(computations, attributes)
    if instruction.opcode == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", attributes)
        if branches:
            return re.findall(r"%?([\w.\-]+)", branches[1]), 1
        return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", attributes), 1
    if instruction.opcode in ("call", "async-start"):
        return re.findall(r"(?:to_apply|calls)=%?([\w.\-]+)", attributes), 1
    return [], 1


def _trips(computations: Computations, attributes: str) -> int:
    """The trip count of a loop with these attributes: the compiler's, or that of a counter from 0 to a constant, or 1
    for other loops."""
    if count := re.search(r'"known_trip_count":\{"n":"(\d+)"', attributes):
        return int(count[1])
    condition = re.search(r"\bcondition=%?([\w.\-]+)", attributes)
    instructions = computations[condition[1]] if condition else ()
    constants = {i.name: int(i.arguments) for i in instructions if i.opcode == "constant" and i.arguments.isdecimal()}
    for instruction in instructions:
        if instruction.is_root and instruction.opcode == "compare" and "direction=LT" in instruction.attributes:
            return next((constants[name] for name in instruction.operands if name in constants), 1)
    return 1


def _traffic(computations: Computations, name: str) -> float:
    arrays = {instruction.name: instruction.arrays for instruction in computations[name]}
    total = 0.0
    for instruction in computations[name]:
        inner, times = _called(computations, instruction)
        if inner:
            total += times * max(_traffic(computations, computation) for computation in inner)
        else:
            total += _moved(instruction, arrays)
    return total


def _moved(instruction: _Instruction, arrays: Mapping[str, tuple[_Array, ...]]) -> float:
    """Bytes of an instruction's operands and results in HBM."""
    opcode, results = instruction.opcode, instruction.arrays
    if opcode in _FREE or opcode.endswith("-done") or 'custom_call_target="ConcatBitcast"' in instruction.attributes:
        return 0.0
    if opcode == "copy-start":  # (destination, source, context)
        return sum(results[0].bytes for array in results[:2] if not array.on_chip)
    if opcode == "slice-start":  # ((source), slice, context)
        return sum(results[1].bytes for array in results[:2] if not array.on_chip)
    operands = [array for operand in dict.fromkeys(instruction.operands) for array in arrays.get(operand, ())]
    if opcode in ("dynamic-slice", "gather", "slice"):  # the part that is read, not the whole operand
        operands = [dataclasses.replace(array, bytes=results[0].bytes) for array in operands[:1]]
    elif opcode == "dynamic-update-slice":  # in place
        operands, results = operands[1:2], tuple(operands[1:2])
    return sum(array.bytes for array in (*operands, *results) if not array.on_chip)


def _collectives(computations: Computations, name: str, fsdp: int) -> Iterable[Collective]:
    arrays = {instruction.name: instruction.arrays for instruction in computations[name]}
    for instruction in computations[name]:
        inner, times = _called(computations, instruction)
        for found in max((list(_collectives(computations, c, fsdp)) for c in inner), key=len, default=[]):
            yield from [found] * times
        kind = instruction.opcode.removesuffix("-start")
        if kind in _COLLECTIVES and instruction.opcode != "async-start":
            groups = _groups(instruction.attributes)
            operands = sum(a.bytes for operand in instruction.operands for a in arrays.get(operand, ()))
            devices = groups.shape[-1]
            whole = operands * devices if kind == "all-gather" else operands
            if devices > 1:
                yield Collective(kind, whole, devices, len(np.unique(groups[0] // fsdp)) > 1)


def _groups(attributes: str) -> np.ndarray:
    """The device groups of a collective, int [groups, devices], in any of HLO's notations."""
    if iota := re.search(rf"replica_groups=\[([\d,]+)\]<={_IOTA}", attributes):
        return _iota(iota[2], iota[3]).reshape(_numbers(iota[1]))
    order = rf"(?:, device_ids=\({_IOTA}\))?"
    if along := re.search(rf"replica_groups=mesh\[([^\]]*)\]{order} \{{([^}}:]*)\}}", attributes):  # names of axes
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", along[1])}
        joined = [list(sizes).index(name) for name in re.findall(r"'([^']+)'", along[4])]
        ids = _iota(along[2] or str(math.prod(sizes.values())), along[3]).reshape(list(sizes.values()))
        ids = np.moveaxis(ids, joined, range(-len(joined), 0))
        return ids.reshape(-1, math.prod(ids.shape[-len(joined) :]))
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]+\},?)+)\}", attributes):
        return np.array([_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    raise ValueError(f"no groups of devices in {attributes[:200]!r}")


def _iota(sizes: str, order: str | None) -> np.ndarray:
    """The numbers from 0 in an array of these sizes, with its axes transposed to that order."""
    source = _numbers(sizes)
    return np.arange(math.prod(source)).reshape(source).transpose(_numbers(order or "") or None)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _merged(collectives: Iterable[Collective]) -> tuple[Collective, ...]:
    """Merges collectives of the same kind and group."""
    totals: dict[tuple[str, int, bool], float] = defaultdict(float)
    for collective in collectives:
        totals[collective.kind, collective.devices, collective.along_data] += collective.bytes
    return tuple(
        Collective(kind, size, devices, along_data) for (kind, devices, along_data), size in sorted(totals.items())
    )


def on_more_chips(collectives: Iterable[Collective], factor: float) -> tuple[Collective, ...]:
    """The same messages on a mesh whose data axis is `factor` times as long."""
    return tuple(dataclasses.replace(c, devices=round(c.devices * factor)) if c.along_data else c for c in collectives)
