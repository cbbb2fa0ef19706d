"""Chips, their peak rates, and the resulting lower bounds on a program's time."""

import dataclasses
from collections.abc import Iterable

from ddpm_jax.planning.hlo import Collective


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one chip.

    Attributes:
      name: the manufacturer's name.
      flops: bfloat16 multiplications and additions per second in matrix products.
      bandwidth: bytes per second from and to its memory (HBM).
      memory: bytes of that memory.
      link: bytes per second that one port of the interconnect sends; 0: unknown.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    link: float = 0.0


# From Google's pages on each version (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e). They give the interconnect's
# bandwidth for all ports and both directions together: 400 GB/s for v5e's four ports, 1,200 for v5p's six, 800 for
# v6e's four; v4's 2,400 Gbit/s are for six ports in one direction.
TPUS = {
    "v4": Chip("TPU v4", 275e12, 1200e9, 32e9, 50e9),
    "v5e": Chip("TPU v5e", 197e12, 819e9, 16e9, 50e9),
    "v5p": Chip("TPU v5p", 459e12, 2765e9, 95e9, 100e9),
    "v6e": Chip("TPU v6e", 918e12, 1638e9, 32e9, 100e9),
}
# From NVIDIA's data sheets, dense bfloat16.
_GPUS = {
    "A100": Chip("A100", 312e12, 1555e9, 40e9),
    "H100 PCIe": Chip("H100 PCIe", 756e12, 2000e9, 80e9),
    "H100": Chip("H100", 989e12, 3350e9, 80e9),
    "H200": Chip("H200", 989e12, 4800e9, 141e9),
}
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip with this name in jax, or None if its peak rates are not in the table."""
    if device_kind in _KINDS:
        return TPUS[_KINDS[device_kind]]
    return next((chip for name, chip in _GPUS.items() if name in device_kind), None)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that each unit of a chip needs at its peak rate; a step takes at least the longest of them."""

    arithmetic: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        return max(self.arithmetic, self.memory, self.network)

    @property
    def bound(self) -> str:
        """The unit that takes longest."""
        return max(("arithmetic", "memory", "network"), key=lambda unit: getattr(self, unit))


def roofline(chip: Chip, flops: float, traffic: float, collectives: Iterable[Collective]) -> Roofline:
    """The bounds on a call with these FLOP, bytes and messages per chip.

    Messages go around a ring along one axis of the chips in both directions, through two ports.
    """
    sent = sum(collective.sent for collective in collectives)
    return Roofline(flops / chip.flops, traffic / chip.bandwidth, sent / (2 * chip.link) if sent else 0.0)
