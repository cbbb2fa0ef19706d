"""Export, import, and training from what was imported."""

import jax
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

import ddpm_jax


@pytest.mark.slow
def test_export_import_and_training_from_there(trained, call, tmp_path):
    """Through diffusers' folder and back: the same images; and training continues from these weights."""
    workdir, folder, again = trained[0], tmp_path / "diffusers", tmp_path / "again"
    status, output = call("--mode=export", f"--workdir={workdir}", f"--out={folder}", config=None)
    assert status == 0, output
    assert (folder / "model_index.json").exists()
    status, output = call("--mode=import", f"--source={folder}", f"--workdir={again}", config=None)
    assert status == 0, output
    first, second = (ddpm_jax.load(path).sample(4, seed=3, num_steps=6) for path in (workdir, again))
    np.testing.assert_array_equal(first, second)

    pictures, tuned = tmp_path / "pictures", tmp_path / "tuned"
    pictures.mkdir()
    for i, digit in enumerate(load_digits().images[:40]):
        Image.fromarray((255 - digit * 15).astype(np.uint8)).save(pictures / f"{i:02d}.png")
    flags = [f"--workdir={tuned}", "--config.data.source=folder", f"--config.data.path={pictures}"]
    flags += ["--config.optimizer.warmup_steps=1", "--config.train.num_steps=4", "--config.checkpoint.keep=9"]
    flags += ["--config.text.num_heads=2"]  # without a text encoder, it means nothing
    status, output = call(*flags, "--config.checkpoint.every_steps=1", f"--init_from={again}")
    assert status == 0, output
    assert f"starting from the weights of {again}, step 0" in output
    assert "40 images of 8x8x1" in output
    # In its first step, the warm-up has a learning rate of 0; later it does not.
    before, first, last = (ddpm_jax.load(*place).params for place in ((again,), (tuned, 1), (tuned, 4)))
    jax.tree.map(np.testing.assert_array_equal, first, before)
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(last), strict=True))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--mode=import",), "--mode=import needs --source"),
        (("--mode=import", "--source=nothing/here/at.all"), "'nothing/here/at.all' is not a folder"),
        (("--mode=import", "--source=nothing.safetensors"), "'nothing.safetensors' is not a file"),
    ],
)
def test_refused_imports(call, tmp_path, flags, message):
    status, output = call(*flags, f"--workdir={tmp_path / 'run'}", config=None)
    assert status == 1
    assert message in output
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_weights_of_another_network(trained, call, tmp_path):
    status, output = call(f"--workdir={tmp_path / 'run'}", f"--init_from={trained[0]}", "--config.model.channels=16")
    assert status == 1
    assert f"--init_from {str(trained[0])!r} has conv_in/bias of shape (8,)" in output
    assert "this config's network has (16,)" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("model.num_groups=2", "num_groups 4, but this"),
        ("model.skip_scale=0.7071", "skip_scale 1.0, but this"),
        ("diffusion.prediction=eps", "'v', but this config"),
    ],
)
def test_weights_of_another_meaning(trained, call, tmp_path, flag, said):
    status, output = call(f"--workdir={tmp_path / 'run'}", f"--init_from={trained[0]}", f"--config.{flag}")
    assert status == 1
    assert f"--init_from {str(trained[0])!r} has {flag.partition('=')[0]}" in output
    assert said in output
