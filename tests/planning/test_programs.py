"""The programs of runs that train something other than a whole network of pixels."""

import pytest
from tiny import small

from ddpm_jax.planning.programs import programs_of
from ddpm_jax.runtime import parallel
from ddpm_jax.runtime.errors import UserError

AUTOENCODER = {"train__objective": "autoencoder", "autoencoder__level_channels": (32, 32)}


def flops(**changes):
    config = small(train__batch_size=8, **changes)
    return programs_of(config, None, parallel.make_mesh(), ["train"])["train"].flops()


def test_adapters_are_trained_beside_the_frozen_network():
    """The kernels' gradients that are not needed are left out, and the adapters' small products come in their place."""
    whole, adapted = flops(), flops(lora__rank=2)
    assert 0.4 * whole < adapted < whole


def test_an_autoencoder_has_a_training_step_alone():
    assert flops(**AUTOENCODER) > 0
    with pytest.raises(UserError, match="--programs is train,sample; accepted for an autoencoder"):
        programs_of(small(**AUTOENCODER), None, parallel.make_mesh(), ["train", "sample"])
