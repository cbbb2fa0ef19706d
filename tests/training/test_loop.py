import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import config as config_lib
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.training import loop

LOG, CHECKPOINT, SAMPLE, STEPS = 2, 3, 4, 8


@pytest.fixture
def config(tmp_path):
    """A small run with a few of everything: metrics, checkpoints and pictures on the way."""
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8)
    np.savez(tmp_path / "images.npz", image=images, caption=[["a plum", "plums"], ["an apple", ""]] * 10)
    config = config_lib.default_config()
    config.data.update(source="array", path=str(tmp_path / "images.npz"), height=8, width=8, channels=1)
    config.model.update(channels=8, num_groups=4, channel_multipliers=(1,), num_res_blocks=1, middle_attention=False)
    config.train.update(batch_size=8, num_steps=STEPS)
    config.log.update(every_steps=LOG, sample_every_steps=SAMPLE, sample_images=8, sample_steps=3, tensorboard=False)
    config.checkpoint.every_steps = CHECKPOINT
    config.sample.update(num_images=16, num_steps=3)
    return config


@pytest.mark.slow
def test_nothing_is_compiled_twice_and_no_step_after_the_first_compiles(config, tmp_path, caplog):
    """With captions, which have programs of their own beside those of any run."""
    config.text.update(encoder="trained", vocab_size=280, max_length=8, width=16, num_layers=1, num_heads=2)
    config.model.middle_attention = True
    with jax.log_compiles(True):
        loop.train(config, tmp_path / "run")
    pattern = re.compile(r"Compiling (\S+) with global shapes and types (.*)")
    compiled = [match.groups() for match in map(pattern.match, caplog.messages) if match]
    assert len(set(compiled)) == len(compiled)
    names = [name for name, _ in compiled]
    assert names.count("jit(step)") == 1
    # What the initial state, and the first report, checkpoint and pictures need; a step has nothing of its own left to
    # compile.
    after = set(names[names.index("jit(step)") + 1 :])
    assert "jit(_measure)" in after
    initial, pictures = {"jit(init)", "jit(create)", "jit(zero)"}, {"jit(_keys_of)", "jit(_start)", "jit(_scan)"}
    # The slice is Orbax's, a device.
    assert after <= {"jit(_measure)", "jit(_encode)", "jit(slice)", *initial, *pictures}
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(LOG, STEPS + 1, LOG))
    assert all(0 <= line["input_wait"] <= 1 for line in lines)


@pytest.mark.slow
def test_a_report_that_cannot_be_written_ends_no_run(config, tmp_path, caplog):
    config.train.num_steps, config.log.sample_every_steps = LOG, 0
    run = tmp_path / "run"
    run.mkdir()
    (run / "evaluation.json").write_text("half of a fi")
    loop.train(config, run)
    assert (run / "samples/final.png").exists()
    assert not (run / "report.html").exists()
    assert "report.html could not be written" in caplog.text


@pytest.mark.slow
def test_a_transfer_that_nobody_asked_for_is_an_error_in_the_loop(config, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "memory", lambda: {"one_more": float(jnp.ones(()) + np.float32(1))})
    config.log.sample_every_steps = 0
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        loop.train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (OSError("No space left"), UserError, "the checkpoint of step 12 is intact"),
        (ValueError("a bug"), ValueError, "a bug"),
    ],
)
def test_the_message_if_the_last_checkpoint_failed_too(monkeypatch, tmp_path, error, kind, said):
    """A full disk may be found by any file first, but only the checkpoints' sentence names the one that is left."""

    def fail(*_):
        raise error

    def unsaved(_):
        raise UserError("a checkpoint could not be written; the checkpoint of step 12 is intact")

    training = object.__new__(loop._Training)
    training.folder, training.config = tmp_path, config_lib.default_config()
    monkeypatch.setattr(loop._Training, "_run", fail)
    monkeypatch.setattr(loop.Checkpoints, "wait", unsaved)
    with pytest.raises(kind, match=said):
        training.run(was_finished=False)
