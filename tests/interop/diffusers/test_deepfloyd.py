"""The folders of DeepFloyd IF's stages: imports and refusals."""

import json
import shutil

import numpy as np
import pytest
import unclips

from ddpm_jax.interop import workdirs
from ddpm_jax.pipeline import load
from ddpm_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("if")
    unclips.write_if(folder / "base")
    unclips.write_if(folder / "larger", enlarges=True)
    return folder


@pytest.mark.slow
def test_base(folder, tmp_path):
    notes = []
    run = load(workdirs.import_weights(str(folder / "base"), tmp_path / "run", notes.append))
    assert [note.split(" is")[0] for note in notes] == [
        "prompts are lowercased and stripped of surrounding spaces; diffusers also removes links and some punctuation "
        "if beautifulsoup4 and ftfy are installed (clean_caption)",
        "the safety checker",
    ]
    assert (run.shape, run.config.sample.guidance_scale, run.config.sample.num_steps) == ((8, 8, 3), 7.0, 100)
    request = run.request(prompts=[" A red Apple "], threshold_limit=2.0)
    assert (request.output.variance, request.output.threshold_limit) == ("learned", 2.0)
    ids = run.condition.texts.tokenizer.encode([" A red Apple ", "a red apple"]).ids
    assert ids.shape == (2, 77)
    np.testing.assert_array_equal(ids[0], ids[1])
    assert run.request().settings()["threshold_limit"] == 1.5


@pytest.mark.slow
def test_larger(folder, tmp_path):
    run = load(workdirs.import_weights(str(folder / "larger"), tmp_path / "run"))
    assert (run.model.given.shape, run.shape) == ((8, 8, 3), (32, 32, 3))
    cond = run.model.given.of_images(np.full((1, 8, 8, 3), 255, np.uint8), 0, np.arange(1))
    assert cond["level"].tolist() == [250]


EDITS = (
    ("base", "unet/config.json", {"in_channels": 6}, "in_channels is 6"),
    ("larger", "unet/config.json", {"class_embed_type": None}, "class_embed_type is None.*accepted: 'timestep'"),
    ("larger", "unet/config.json", {"sample_size": 30}, "sample_size is"),
    ("base", "unet/config.json", {"encoder_hid_dim": 12}, "encoder_hid_dim is 12"),
    ("larger", "image_noising_scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "a different noise"),
)


@pytest.mark.parametrize(("stage", "file", "edit", "said"), EDITS)
def test_configs_that_are_refused(folder, tmp_path, stage, file, edit, said):
    shutil.copytree(folder / stage, tmp_path / "x")
    path = tmp_path / "x" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
    with pytest.raises(UserError, match=said):
        workdirs.import_weights(str(tmp_path / "x"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_parts_that_are_not_there(folder, tmp_path):
    shutil.copytree(folder / "base", tmp_path / "x")
    shutil.rmtree(tmp_path / "x" / "text_encoder")
    with pytest.raises(UserError, match="has no text_encoder/, which diffusers' IFPipeline has"):
        workdirs.import_weights(str(tmp_path / "x"), tmp_path / "run")
