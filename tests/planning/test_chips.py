import pytest

from ddpm_jax.planning.chips import Chip, chip_of, roofline
from ddpm_jax.planning.hlo import Collective


class TestRoofline:
    CHIP = Chip("chip", flops=100.0, bandwidth=10.0, memory=1.0, link=2.0)

    @pytest.mark.parametrize(
        ("flops", "traffic", "size", "bound", "seconds"),
        [(300.0, 20.0, 4.0, "arithmetic", 3.0), (300.0, 50.0, 4.0, "memory", 5.0), (300.0, 20.0, 16.0, "network", 6.0)],
    )
    def test_takes_the_longest_of_the_three(self, flops, traffic, size, bound, seconds):
        found = roofline(self.CHIP, flops, traffic, [Collective("all-reduce", size, 4)])
        assert (found.bound, found.seconds) == (bound, seconds)

    def test_no_messages_take_no_time_on_a_chip_without_known_links(self):
        assert roofline(Chip("gpu", 1.0, 1.0, 1.0), 1.0, 1.0, []).network == 0


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("cpu", None),
    ],
)
def test_chips_by_what_jax_calls_them(kind, name):
    chip = chip_of(kind)
    assert (chip and chip.name) == name
