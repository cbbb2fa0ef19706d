"""The modes on a tiny run: files, tables of pictures, shards, refusals."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from tiny import PICTURES, QUICK, RNG, make_run, near

from ddpm_jax.commands import editing, evaluation, job, sampling
from ddpm_jax.commands.job import Job, _in_a_name
from ddpm_jax.runtime.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run():
    return make_run()


@pytest.fixture(scope="module")
def classes():
    return make_run(class_conditional=True, label_dropout=0.1)


def test_names_of_files_differ_if_the_flags_do():
    told = [
        {},
        {"input": "data:1"},
        {"prompt": "a:b"},
        {"prompt": "a-b"},
        {"prompt": "a,b"},
        {"prompt": "a\nb"},  # two prompts
        {"prompt": "a+b"},
        {"input": "a/1.png"},
        {"input": "b/1.png"},
        {"input": "a.png,b.png"},
        {"input": "a.png+b.png"},
        {"input": "\u732b" * 200},
        {"input": "x" * 200},
        {"input": "x" * 201},
        {"sampler": "ddim", "t": "3"},
    ]
    names = [_in_a_name(each) for each in told]
    assert len(set(names)) == len(names)
    assert all(len(name.encode()) <= 100 for name in names)
    assert names[:2] == ["", "_input_data-1"]
    assert names[-1] == "_ddim_t_3"
    assert names[3:5] == ["_prompt_a-b", "_prompt_a+b"]


class TestCommands:
    @pytest.fixture
    def files(self, tmp_path):
        for i, picture in enumerate(PICTURES):
            Image.fromarray(picture[..., 0]).save(tmp_path / f"{i}.png")
        mask = np.zeros((8, 8), np.uint8)
        mask[4:] = 255
        Image.fromarray(mask).save(tmp_path / "mask.png")
        return [str(tmp_path / f"{i}.png") for i in range(3)]

    @pytest.mark.parametrize(
        ("mode", "inputs", "arguments", "tiles"),
        [
            (editing.interpolate, 2, {"t": ["5", "20"], "weights": []}, (13, 2)),
            (editing.interpolate_latents, 2, {"weights": ["0", "0.5", "1"]}, (5, 1)),
            (editing.vary, 3, {"t": ["2", "20"], "num_images": 4}, (5, 6)),
            (editing.denoise, 2, {"t": []}, (2, 2)),
            (editing.inpaint, 2, {"mask": "mask.png", "jump": 2, "times": 2, "num_images": 3}, (4, 2)),
            (sampling.progressive, 0, {"num_images": 2, "num_stages": None, "of": "x_0"}, (4, 2)),
            (editing.coarse_to_fine, 0, {"num_images": 3, "t": ["39", "20", "1"]}, (3, 3)),
        ],
    )
    def test_modes_end_in_a_picture(self, run, files, tmp_path, mode, inputs, arguments, tiles):
        if inputs:
            arguments = {"input": files[:inputs], **arguments}
        if "mask" in arguments:
            arguments["mask"] = str(tmp_path / "mask.png")
        found = mode(Job(run, tmp_path, 1, options=QUICK), **arguments)
        if mode is sampling.progressive:
            found, animation = found
            assert animation == found.with_suffix(".gif")
            assert Image.open(animation).n_frames == 4
        assert found.parent == tmp_path / "samples"
        assert Image.open(found).size == tuple(66 * count + 2 for count in tiles)

    def test_a_grid_has_a_row_a_class(self, classes, tmp_path):
        options = {"labels": [2, 0], **QUICK}
        job = Job(classes, tmp_path, out=str(tmp_path / "grid.png"), options=options)
        path = sampling.sample(job, num_images=None, batch_size=None, output="grid")
        tiles = np.asarray(Image.open(path))[2:, 2:].reshape(2, 66, 8, 66).swapaxes(1, 2)[:, :, :64:8, :64:8]
        assert near(tiles[1, :, :, :, None], classes.sample(16, labels=[2, 0], **QUICK)[1::2])

    def shards(self, run, folder, **changes):
        job = Job(run, folder, changes.pop("seed", 1), str(folder), changes.pop("options", QUICK))
        arguments = {"images": "0-24", "shard_size": 10, "part": "0/1", "batch_size": 8} | changes
        return sampling.sample_shards(job, **arguments)

    def test_shards_are_made_once_and_shared(self, run, tmp_path):
        self.shards(run, tmp_path, part="1/2")
        (second,) = sorted(tmp_path.iterdir())
        assert second.name == "images_000000010-000000019.npz"
        before = second.stat().st_mtime_ns
        self.shards(run, tmp_path)
        assert second.stat().st_mtime_ns == before
        files = [np.load(path) for path in sorted(tmp_path.iterdir())]
        assert [len(file["image"]) for file in files] == [10, 10, 10]
        np.testing.assert_array_equal(np.concatenate([file["index"] for file in files]), np.arange(30))
        assert near(np.concatenate([file["image"] for file in files]), run.sample(30, seed=1, batch_size=8, **QUICK))
        self.shards(run, tmp_path, images="15-39")
        assert len(list(tmp_path.iterdir())) == 4
        (tmp_path / "images_000000000-000000009.npz").write_bytes(b"cut off")
        self.shards(run, tmp_path)
        np.testing.assert_array_equal(np.load(tmp_path / "images_000000000-000000009.npz")["image"], files[0]["image"])

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"seed": 2}, "made with different settings (seed: 1 -> 2); choose another --out"),
            ({"options": {"num_steps": 5}}, "(num_steps: 4 -> 5)"),
            ({"shard_size": 7}, "a shard of a different size"),
            ({"images": "5-3"}, "--images is 5-3; accepted: FIRST-LAST"),
            ({"shard_size": 0}, "--shard_size is 0; at least 1"),
            ({"part": "2/2"}, "--part is 2/2; accepted: 0/N to N-1/N"),
        ],
    )
    def test_refused_shards(self, run, tmp_path, changes, said):
        self.shards(run, tmp_path, images="0-9")
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(UserError) as caught:
            self.shards(run, tmp_path, **changes)
        assert said in str(caught.value)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_a_row_that_lacks_images_ends_in_white(self, classes, tmp_path):
        options = {"labels": [2, 0, 1], **QUICK}
        job = Job(classes, tmp_path, out=str(tmp_path / "a.png"), options=options)
        path = sampling.sample(job, num_images=5, batch_size=None, output="grid")
        tiles = np.asarray(Image.open(path))[2:, 2:].reshape(3, 66, 2, 66).swapaxes(1, 2)
        assert [bool(np.all(tiles[row, 1] == 255)) for row in range(3)] == [False, False, True]

    def test_pictures_go_to_a_new_folder(self, run, tmp_path):
        job = Job(run, tmp_path, out=str(tmp_path / "new"), options=QUICK)
        path = sampling.sample(job, num_images=3, batch_size=None, output="png")
        assert [p.name for p in sorted(path.iterdir())] == [f"{i:06d}.png" for i in range(3)]
        with pytest.raises(UserError, match="exists and is not empty"):
            sampling.sample(job, num_images=2, batch_size=None, output="png")

    def test_evaluation_adds_up(self, run, tmp_path, capsys):
        """Against given images, with the history kept: samples, the same again, a file with itself, and a reference."""
        real, reference = tmp_path / "real.npz", tmp_path / "reference.npz"
        np.savez(real, image=RNG.integers(0, 256, (40, 8, 8, 1), np.uint8))

        def evaluate(options=QUICK, **changes):
            arguments = {"num_images": 20, "features": None, "against": str(real), "generated": None, "batch_size": 16}
            arguments |= {"shard_size": 8, "likelihood": "none", "likelihood_images": 2, "save_reference": None}
            arguments["clip_model"] = None
            return evaluation.evaluate(Job(run, tmp_path, options=options), **arguments | changes)

        name = "Frechet distance (digits classifier)"
        first = evaluate(save_reference=str(reference))
        assert (first["num_real"], first["num_generated"], first["step"], first["num_steps"]) == (40, 20, 3, 4)
        assert first[name] > 1
        (folder,) = (tmp_path / "samples").iterdir()
        times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")}
        assert len(times) == 6  # three shards and their features
        assert evaluate()[name] == first[name]
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")} == times
        itself = evaluate(generated=str(real), num_images=None, options={})
        assert itself[name] == pytest.approx(0, abs=1e-6)
        assert (itself["precision"], itself["recall"]) == (1, 1)
        moments = evaluate(against=str(reference))
        assert moments[name] == pytest.approx(first[name], rel=1e-9)
        assert "precision" in moments["not computed"]
        history = json.loads((tmp_path / "evaluation.json").read_text())
        assert [entry[name] for entry in history] == [first[name], first[name], itself[name], moments[name]]
        assert "FID" not in (tmp_path / "evaluation.md").read_text()
        assert re.search(rf"{re.escape(name)} +[\d.]+ \([\d.]+ to [\d.]+\)  floor [\d.]+\n", capsys.readouterr().out)
        for changes, said in (
            ({"features": "none.pth"}, "does not exist; download https://"),
            ({"generated": "none", "num_images": None, "options": {}}, "--generated:"),
            ({"generated": "none"}, "these would do nothing: --num_images, --num_steps"),
            ({"against": "none"}, "--against:"),
            ({"likelihood": "exact"}, "--likelihood is 'exact'; accepted: estimate, bound, flow, none"),
        ):
            with pytest.raises(UserError, match=said):
                evaluate(**changes)

    @pytest.mark.parametrize(
        ("inputs", "said"),
        [
            (["none.png"], "--input 'none.png' cannot be read as a picture: No such file or directory"),
            ([], "--input is missing; accepted: 1 or more"),
        ],
    )
    def test_refused_inputs(self, run, tmp_path, inputs, said):
        with pytest.raises(UserError) as caught:
            editing.vary(Job(run, tmp_path, options=QUICK), input=inputs, t=[], num_images=1)
        assert said in str(caught.value)

    @pytest.mark.parametrize(
        ("call", "said"),
        [
            (
                lambda: job.parse_range("images", "5", "-"),
                "--images is '5'; accepted: two numbers such as 0-4",
            ),
            (lambda: job.parse_range("part", "-1/4", "/"), "--part is '-1/4'"),
            (lambda: job.parse_numbers("t", ["5", "x"]), "--t is '5,x'; accepted: numbers"),
        ],
    )
    def test_refused_flags(self, call, said):
        with pytest.raises(UserError) as caught:
            call()
        assert said in str(caught.value)
