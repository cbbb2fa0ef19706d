import pytest

from ddpm_jax.planning.table import table

PROGRAM = {
    "title": "training step of 128 images",
    "flops": 4.44e12,
    "seconds": 0.0211,
    "utilisation": 0.213,
    "attention": ("256 queries, 256 keys, 1 x 256 channels: whole, an example's logits take 0.25 MiB",),
}


def measured(seconds):
    """The measurement of a run that takes this many seconds on one GPU."""
    return {
        "kind": "measurement",
        "parameters": 35_746_307,
        "dtype": "bfloat16",
        "remat": "none",
        "batch": 128,
        "steps": 800_000,
        "chips": 1,
        "device": "NVIDIA H200",
        "chip": {"name": "H200"},
        "mesh": {"data": 1, "fsdp": 1},
        "programs": {"train": PROGRAM},
        "run": {
            "train": {
                "steps_per_second": 47.4,
                "images_per_second": 6068.0,
                "days": seconds / 86400,
                "chip_hours": seconds / 3600,
            },
            "sample": {
                "images": 50_000,
                "images_per_second_and_chip": 2.9623,
                "hours": seconds / 3600,
                "chip_hours": seconds / 3600,
            },
        },
    }


def test_a_measurement():
    assert table(measured(16880)).splitlines() == [
        "35,746,307 parameters, bfloat16, remat none, batch 128, on 1 x NVIDIA H200, mesh data 1 fsdp 1",
        "Measured here, with random weights and images.",
        "",
        "training step of 128 images",
        "  arithmetic                 4.44 TFLOP",
        "  a call                    210 TFLOP/s    21.100 ms  21.3% of the bfloat16 peak: model-FLOP utilisation",
        "  attention              256 queries, 256 keys, 1 x 256 channels: whole, an example's logits take 0.25 MiB",
        "",
        "800,000 steps: 47.4 steps/s, 6,068 images/s, 4.69 hours, 4.69 chip-hours",
        "50,000 samples: 2.96 images/s and chip, 4.69 hours, 4.69 chip-hours",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"), [(20.9, "20.9 seconds"), (2257, "37.6 minutes"), (90_000, "25 hours"), (2.6e6, "30.1 days")]
)
def test_a_time_is_shown_in_the_unit_that_suits_it(seconds, words):
    assert f" images/s, {words}, " in table(measured(seconds))
    assert f" images/s and chip, {words}, " in table(measured(seconds))
