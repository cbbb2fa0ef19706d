"""The programs of runs that train something other than a whole network of pixels."""

import jax
import pytest
from tiny import small

from ddpm_jax.interop.diffusers import autoencoder as interop
from ddpm_jax.models.autoencoder import Autoencoder, param_shapes
from ddpm_jax.planning.programs import names_of, programs_of
from ddpm_jax.runtime import parallel
from ddpm_jax.runtime.errors import UserError

AUTOENCODER = {"train__objective": "autoencoder", "autoencoder__level_channels": (32, 32)}


def planned(name, dtype=None, **changes):
    config = small(train__batch_size=8, sample__batch_size=8, **changes)
    return programs_of(config, None, parallel.make_mesh(), [name], dtype)[name]


@pytest.mark.slow
def test_adapters_are_trained_beside_the_frozen_network():
    """Unneeded gradients of kernels are not computed; the adapters' small products replace them."""
    whole, adapted = (planned("train", **changes).flops() for changes in ({}, {"lora__rank": 2}))
    assert 0.4 * whole < adapted < whole


@pytest.mark.slow
def test_an_autoencoder_only_has_a_training_step():
    assert planned("train", **AUTOENCODER).flops() > 0
    with pytest.raises(UserError, match="--programs has 'sample'; accepted for this run: train"):
        planned("sample", **AUTOENCODER)


def test_a_clip_only_has_a_training_step():
    clip = {"train__objective": "clip", "text__encoder": "trained", "clip__width": 16, "clip__num_layers": 1}
    assert planned("train", **clip).flops() > 0
    with pytest.raises(UserError, match="--programs has 'sample'; accepted for this run: train"):
        planned("sample", **clip)


class TestDecoding:
    def test_of_latents(self, tmp_path):
        """In bfloat16 the weights take half the memory, and the arithmetic is the same."""
        net = Autoencoder(channels=3, widths=(32, 32), num_res_blocks=1)
        zeros = jax.tree.map(lambda x: jax.numpy.zeros(x.shape), param_shapes(net))
        interop.write(tmp_path / "vae", net, zeros, 0.5)
        latent = {"autoencoder__source": str(tmp_path / "vae"), "diffusion__clip": False}
        assert names_of(small(**latent)) == ("train", "sample", "decode", "evaluate")
        exact, half = (planned("decode", dtype, **latent) for dtype in (None, "bfloat16"))
        weights, held = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(p.arguments[0])) for p in (exact, half))
        assert weights == 2 * held > 0
        assert exact.flops() == half.flops() > 0
        assert exact.images == 8

    def test_pixels_need_none(self):
        assert names_of(small()) == ("train", "sample", "evaluate")
        with pytest.raises(UserError, match="'decode'; accepted for this run: train, sample, evaluate"):
            planned("decode")
