import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import of_classes

from ddpm_jax import config as config_lib
from ddpm_jax.interop import workdirs
from ddpm_jax.interop.diffusers import folder as folder_lib
from ddpm_jax.interop.diffusers.folder import WEIGHTS
from ddpm_jax.pipeline import load
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.workdir import LOCK, check_dataset, locked

pytestmark = pytest.mark.slow


def small_config(**model):
    config = config_lib.default_config()
    config.data.update(source="folder", height=8, width=8)
    config.model.update(
        channels=8, channel_multipliers=(1, 2), num_res_blocks=1, num_groups=4, attention_resolutions=(4,), dropout=0.0
    )
    config.model.update(model)
    config.diffusion.num_timesteps = 20
    config.log.sample_steps = 20
    return config


def random_params(config, num_classes=0, seed=0):
    rng = np.random.default_rng(seed)
    shapes = config_lib.make_model(config, of_classes(num_classes)).param_shapes()
    return jax.tree.map(lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)


def assert_same(params, expected):
    params, expected = flatten_dict(params, sep="."), flatten_dict(expected, sep=".")
    assert params.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(params[name], value)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    config = small_config()
    folder, net = tmp_path_factory.mktemp("original") / "theirs", config_lib.make_network(config)
    assert folder_lib.write(folder, config, net, random_params(config)) == []
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A diffusers folder of a small network with random weights."""
    return shutil.copytree(original, tmp_path / "theirs")


def test_import_makes_a_run(folder, tmp_path):
    path = workdirs.import_weights(str(folder), tmp_path / "run")
    run = load(path)
    assert_same(run.params, random_params(small_config()))
    assert_same(load(path, raw=True).params, random_params(small_config()))
    assert run.step == 0
    images = run.sample(num_images=2, num_steps=2)
    assert images.shape == (2, 8, 8, 3)
    assert images.dtype == np.uint8
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run", "theirs"]


def test_there_and_back_is_the_same_to_the_byte(folder, tmp_path):
    run = load(workdirs.import_weights(str(folder), tmp_path / "run"))
    again = workdirs.export_weights(run, tmp_path / "again")
    for file in (
        "unet/config.json",
        "scheduler/scheduler_config.json",
        "model_index.json",
        f"unet/{WEIGHTS[0]}",
    ):
        assert (folder / file).read_bytes() == (again / file).read_bytes(), file


def test_flat_layout_and_former_names(folder, tmp_path):
    """As in the first folders on the hub: no sub-folders, and the old names of attention's layers."""
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "config.json").write_bytes((folder / "unet/config.json").read_bytes())
    (flat / "scheduler_config.json").write_bytes((folder / "scheduler/scheduler_config.json").read_bytes())
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in load_file(folder / "unet" / WEIGHTS[0]).items():
        for new, former in old.items():
            name = name.replace(f".{new}.", f".{former}.")
        renamed[name] = value
    assert any(".query." in name for name in renamed)
    save_file(renamed, flat / WEIGHTS[0])
    run = load(workdirs.import_weights(str(flat), tmp_path / "run"))
    assert_same(run.params, random_params(small_config()))


@pytest.mark.parametrize("class_conditional", [False, True])
def test_plain_safetensors_there_and_back(tmp_path, class_conditional):
    """Any option of ours survives; the tensors are named like the tree."""
    config = small_config(upsample="transposed", attention_patch_size=2, class_conditional=class_conditional)
    config.diffusion.update(prediction="v", schedule="cosine", variance="learned", loss="hybrid")
    params = random_params(config, 3)
    dataset = {"source": "x", "num_images": 7, "class_names": ["a", "b", "c"], "fingerprint": "f", "shape": [8, 8, 3]}
    file = workdirs.plain.write(tmp_path / "x.safetensors", config, dataset, 17, params)
    assert load_file(file)["down_0_0_res.conv_0.kernel"].shape == (3, 3, 8, 8)
    run = load(workdirs.import_weights(str(file), tmp_path / "run"))
    assert_same(run.params, params)
    assert run.config == config
    assert (run.step, run.dataset) == (17, {**dataset, "imported": str(file)})
    with pytest.raises(UserError, match="start another workdir from them with --init_from"):
        check_dataset(tmp_path / "run", dataset)
    again = workdirs.export_weights(run, tmp_path / "again.safetensors")
    assert_same(load_file(again), load_file(file))
    with pytest.raises(UserError, match="already exists"):
        workdirs.export_weights(run, again)


@pytest.mark.parametrize("name", ["autoencoder/../../x/kernel", "params/x/kernel", "autoencoder//kernel"])
def test_plain_safetensors_with_other_files(tmp_path, name):
    config, file = small_config(), tmp_path / "x.safetensors"
    dataset = {"source": "x", "num_images": 7, "class_names": [], "fingerprint": "f", "shape": [8, 8, 3]}
    workdirs.plain.write(file, config, dataset, 17, random_params(config))
    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    save_file({**load_file(file), name: np.zeros(1, np.float32)}, file, metadata)
    with pytest.raises(UserError, match="accepted: files in text_encoder, autoencoder, clip"):
        workdirs.import_weights(str(file), tmp_path / "run")


def change_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(folder, tmp_path, said):
    with pytest.raises(UserError) as caught:
        workdirs.import_weights(str(folder), tmp_path / "run")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["theirs"], "something half-made is left"


@pytest.mark.parametrize(
    ("file", "fields", "said"),
    [
        ("unet/config.json", {"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}, "'SkipDownBlock2D' in "),
        ("scheduler/scheduler_config.json", {"beta_schedule": "squared"}, "beta_schedule is 'squared' in "),
    ],
)
def test_what_is_not_ours(folder, tmp_path, file, fields, said):
    change_json(folder / file, **fields)
    refused(folder, tmp_path, f"{said}{str(folder / file)!r}")


def rewrite(folder, change):
    path = folder / "unet" / WEIGHTS[0]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


NAME = "down_blocks.0.resnets.0.conv1.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(NAME), f"no tensor '{NAME}'"),
        (lambda tensors: tensors.update(extra=np.zeros(1, np.float32)), "a tensor 'extra'"),
        (lambda tensors: tensors.update({NAME: np.zeros((8, 8, 3), np.float32)}), f"'{NAME}'"),
        (lambda tensors: tensors.update({NAME: tensors[NAME].astype(np.float64)}), "is float64; accepted: float32"),
    ],
)
def test_weights_that_lie(folder, tmp_path, change, said):
    rewrite(folder, change)
    refused(folder, tmp_path, said)


def test_truncated_weights(folder, tmp_path):
    path = folder / "unet" / WEIGHTS[0]
    path.write_bytes(path.read_bytes()[:-10])
    refused(folder, tmp_path, "cannot be read")


@pytest.mark.parametrize("file", ["unet/config.json", "scheduler/scheduler_config.json", f"unet/{WEIGHTS[0]}"])
def test_missing_file(folder, tmp_path, file):
    (folder / file).unlink()
    refused(folder, tmp_path, "unet" if file.endswith("tensors") else file)


def test_broken_json(folder, tmp_path):
    (folder / "unet/config.json").write_text("{")
    refused(folder, tmp_path, "is not valid JSON")


def test_workdir_in_use(folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine").touch()
    with pytest.raises(UserError, match="not empty"):
        workdirs.import_weights(str(folder), tmp_path / "run")
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["mine"]


def test_one_writer(folder, tmp_path):
    with locked(tmp_path / "run", "import"):
        with pytest.raises(UserError, match=r"run' is in use by process \d+ on host .* \(import since"):
            workdirs.import_weights(str(folder), tmp_path / "run")
        left = json.loads((tmp_path / "run" / LOCK).read_text()) | {"started": 1}
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).write_text(json.dumps(left))  # as an import that was killed leaves it
    assert load(workdirs.import_weights(str(folder), tmp_path / "run")).step == 0
    assert not (tmp_path / "run" / LOCK).exists()


def test_neither_folder_nor_hub_name(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        workdirs.import_weights(str(tmp_path / "nothing"), tmp_path / "run")


def test_hub_name_offline(tmp_path, monkeypatch, python):
    """With the hub's own offline switch, the import fails immediately with one sentence."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    said = python(
        "from ddpm_jax.interop import workdirs\n"
        "from ddpm_jax.runtime.errors import UserError\n"
        "try:\n    workdirs.import_weights('google/ddpm-cifar10-32', sys.argv[1])\n"
        "except UserError as error:\n    print(error)\n",
        tmp_path / "run",
    )
    assert "'google/ddpm-cifar10-32' is not a local folder, and the Hugging Face hub does not provide it" in said
    assert not (tmp_path / "run").exists()
