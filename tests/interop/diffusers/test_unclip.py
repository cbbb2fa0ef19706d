"""The folders of whole Karlo pipelines: imports and refusals."""

import json
import shutil

import numpy as np
import pytest
import unclips
from safetensors.numpy import load_file, save_file

from ddpm_jax.interop import workdirs
from ddpm_jax.interop.diffusers import folder as folder_lib
from ddpm_jax.pipeline import load
from ddpm_jax.runtime.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return unclips.write_unclip(tmp_path_factory.mktemp("karlo") / "theirs")


@pytest.fixture(scope="module")
def imported(folder):
    return workdirs.import_weights(str(folder), folder.with_name("run"))


def refusal(source, tmp_path):
    """The message of an import that fails, and leaves nothing behind."""
    with pytest.raises(UserError) as caught:
        workdirs.import_weights(str(source), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.slow
def test_stages(imported):
    names = sorted(path.name for path in imported.glob("stage_*"))
    assert names == ["stage_1_prior", "stage_2_decoder", "stage_3_super_resolution"]
    run = load(imported)
    assert [stage.shape for stage in run.stages] == [(1, 1, 16), (8, 8, 3), (16, 16, 3)]
    requests = [run.request(prompts=["a red apple"]), *run.request(prompts=["a red apple"]).then]
    assert [request.guidance.scale for request in requests] == [4.0, 8.0, 1.0]
    assert [request.steps.num_steps for request in requests] == [25, 25, 7]
    assert run.settings(seed=0, prompts=["a red apple"])["stages"][1]["num_steps"] == 7
    # Nothing is rescaled between the prior and the decoder but by the prior's statistics.
    embedder, given = run.stages[0].model.decoder.embedder, run.stages[1].model.given
    x = np.random.default_rng(0).standard_normal((2, 1, 1, 16)).astype(np.float32)
    np.testing.assert_allclose(embedder.scaled(run.stages[0].model.decoder.decode(x)), x, atol=1e-5)
    np.testing.assert_array_equal(given.of_images(x, 0, np.arange(2))["embedding"], x[:, 0, 0])


@pytest.mark.slow
def test_pictures_need_an_image_encoder(imported):
    with pytest.raises(UserError, match=r"imported without CLIP's image encoder.*UnCLIPImageVariationPipeline"):
        load(imported).variations(np.zeros((1, 8, 8, 3), np.uint8))


@pytest.mark.slow
def test_a_stage_is_a_run_by_itself(imported):
    run = load(imported / "stage_3_super_resolution")
    picture = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    enlarged = run.upscale(picture, num_steps=2)
    assert enlarged.shape == (1, 16, 16, 3)
    params = {**run.params, "last": run.params["net"]}
    other = type(run)(**{**vars(run), "params": params}).upscale(picture, num_steps=2)
    assert not np.array_equal(other, enlarged)  # the last step is that of the other network


@pytest.mark.slow
def test_a_stage_in_one_file_with_its_clip(tmp_path):
    """The exported file needs neither the workdir nor the folder that it came from."""
    folder = unclips.write_unclip(tmp_path / "theirs", of_pictures=True)
    imported = workdirs.import_weights(str(folder), tmp_path / "run")
    run = load(next(imported.glob("stage_*_decoder")))
    picture, options = np.full((1, 8, 8, 3), 100, np.uint8), {"num_steps": 1}
    expected = run.variations(picture, **options)
    file = workdirs.export_weights(run, tmp_path / "x.safetensors")
    shutil.rmtree(folder)
    shutil.rmtree(imported)
    again = load(workdirs.import_weights(str(file), tmp_path / "again"))
    np.testing.assert_array_equal(again.variations(picture, **options), expected)


@pytest.mark.slow
def test_variations(tmp_path):
    theirs = unclips.write_unclip(tmp_path / "theirs", of_pictures=True)
    run = load(workdirs.import_weights(str(theirs), tmp_path / "run"))
    picture = np.random.default_rng(0).integers(0, 256, (2, 9, 12, 3), np.uint8)
    assert run.variations(picture, num_steps=2).shape == (2, 16, 16, 3)
    found = run.embedder.of_pictures(picture)
    assert np.abs(np.linalg.norm(found, axis=1) - 1).min() > 1e-2  # CLIP's own lengths


EDITS = {
    "prior/config.json": (
        ({"norm_in_type": "layer"}, "norm_in_type is 'layer'"),
        ({"num_embeddings": 21}, "num_embeddings is 21"),
        ({"embedding_dim": 12}, "embedding_dim is 12 in .*hidden_size 16"),
    ),
    "decoder/config.json": (({"class_embed_type": None}, "class_embed_type is None"),),
    "text_proj/config.json": (({"cross_attention_dim": 8}, "cross_attention_dim is 12.*accepted: 8"),),
    "super_res_last/config.json": (({"norm_num_groups": 2}, "norm_num_groups is 2.*as super_res_first"),),
    "super_res_first/config.json": (({"in_channels": 3}, "in_channels is 6.*as super_res_first"),),
    "decoder_scheduler/scheduler_config.json": (({"_class_name": "DDPMScheduler"}, "UnCLIPScheduler"),),
    "text_encoder/config.json": (({"architectures": ["CLIPTextModel"]}, "text_projection.weight"),),
}


@pytest.mark.parametrize(("file", "edit", "said"), [(file, *case) for file, cases in EDITS.items() for case in cases])
def test_configs_that_are_refused(folder, tmp_path, file, edit, said):
    shutil.copytree(folder, tmp_path / "x")
    path = tmp_path / "x" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
    found = refusal(tmp_path / "x", tmp_path)
    with pytest.raises(UserError, match=said):
        raise UserError(found)


def test_parts_that_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "x")
    for part in ("super_res_last", "prior"):
        path = tmp_path / "x" / part / unclips.WEIGHTS[0]
        tensors = load_file(path)
        left_out, value = tensors.popitem()
        save_file(tensors, path)
        assert f"{left_out!r}" in refusal(tmp_path / "x", tmp_path)
        save_file(tensors | {left_out: value}, path)
    (tmp_path / "x" / "text_proj").rename(tmp_path / "away")
    assert "has no text_proj/" in refusal(tmp_path / "x", tmp_path)
    index = tmp_path / "x" / "model_index.json"
    index.write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    (tmp_path / "x" / "prior").rename(tmp_path / "prior")
    said = refusal(tmp_path / "x", tmp_path)
    assert "_class_name is 'KandinskyPipeline'" in said
    assert "'UnCLIPPipeline'" in said


def test_files_of_the_hub():
    weights = [f"{part}/diffusion_pytorch_model.safetensors" for part in ("decoder", "prior", "super_res_last")]
    others = [
        "image_encoder/config.json",
        "image_encoder/model.safetensors",
        "image_noising_scheduler/scheduler_config.json",
        "prior_scheduler/scheduler_config.json",
        "tokenizer/spiece.model",
    ]
    wanted = sorted([*weights, *others])
    assert sorted(folder_lib.needed([*wanted, "safety_checker/config.json", "watermarker/config.json"])) == wanted
