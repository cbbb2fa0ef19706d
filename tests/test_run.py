"""What one does with a run, on a tiny network of random weights: shapes, seeds, batches, devices, refusals, files."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from PIL import Image

from ddpm_jax import command_line, parallel
from ddpm_jax import config as config_lib
from ddpm_jax.errors import UserError
from ddpm_jax.run import Run
from ddpm_jax.training.state import init_params

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (3, 8, 8, 1), np.uint8)
QUICK = {"num_steps": 4}


def make_run(devices=8, class_conditional=False, label_dropout=0.0, **sample):
    config = config_lib.default_config()
    config.data.update(source="digits", height=8, width=8, channels=1, flip=False)
    config.model.update(channels=8, num_groups=4, channel_multipliers=(1,), num_res_blocks=1, middle_attention=False)
    config.model.class_conditional = class_conditional
    config.train.label_dropout = label_dropout
    config.diffusion.num_timesteps = 40
    config.log.sample_steps = 0
    config.sample.update(batch_size=16, **sample)
    config_lib.validate(config)
    names = [str(i) for i in range(3)]
    dataset = {"source": "digits", "class_names": names, "num_images": 1797, "shape": [8, 8, 1], "fingerprint": "x"}
    net = config_lib.make_model(config, 3)
    init = jax.jit(lambda: init_params(net, (8, 8, 1), 0), compiler_options=parallel.run_once_options())
    # Its last layer starts at zero: without this the network would say nothing.
    params = jax.tree.map(lambda p: p + 0.1 * np.cos(np.arange(p.size)).reshape(p.shape), init())
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    params = jax.device_put(params, parallel.replicated(mesh))
    return Run(config, dataset, 3, 0.99, net, config_lib.make_schedule_from(config), params, mesh)


@pytest.fixture(scope="module")
def run():
    return make_run()


@pytest.fixture(scope="module")
def classes():
    return make_run(class_conditional=True, label_dropout=0.1)


def near(a, b):
    """To one grey level."""
    return a.shape == b.shape and np.max(np.abs(a.astype(int) - b)) <= 1


class TestImages:
    def test_of_a_number_do_not_depend_on_the_others(self, run):
        many = run.sample(20, seed=1, **QUICK)
        assert near(run.sample(seed=1, indices=[13, 2], **QUICK), many[[13, 2]])
        assert near(run.sample(20, seed=1, batch_size=8, **QUICK), many)
        assert len({image.tobytes() for image in many}) == 20
        assert not near(run.sample(20, seed=2, **QUICK), many)

    def test_are_the_same_again_to_the_bit(self, run):
        np.testing.assert_array_equal(run.sample(5, seed=1, **QUICK), run.sample(5, seed=1, **QUICK))

    @pytest.mark.parametrize("sampler", ["ddpm", "unipc"])
    def test_do_not_depend_on_the_devices(self, run, sampler):
        one = make_run(devices=1)
        assert near(one.sample(16, sampler=sampler, **QUICK), run.sample(16, sampler=sampler, **QUICK))

    def test_follow_the_config_and_what_is_given_instead(self):
        run = make_run(sampler="ddim", eta=0.5, num_steps=4)
        plain = make_run()
        assert near(run.sample(8), plain.sample(8, sampler="ddim", eta=0.5, num_steps=4))
        # Another sampler has its own options, not the config's of ddim.
        assert near(run.sample(8, sampler="unipc"), plain.sample(8, sampler="unipc", num_steps=4))
        assert near(
            run.sample(8, timesteps=[30, 10, 0]), plain.sample(8, sampler="ddim", eta=0.5, timesteps=[30, 10, 0])
        )

    def test_progress_counts_the_calls_of_all_batches(self, run):
        told = []
        run.sample(40, sampler="heun", num_steps=5, progress=lambda *position: told.append(position))
        assert told == [(done, 27) for done in (9, 18, 27)]  # three batches of nine calls

    def test_of_classes_go_round(self, classes):
        labels = classes.labels_of(range(8))
        np.testing.assert_array_equal(labels, [0, 1, 2, 0, 1, 2, 0, 1])
        np.testing.assert_array_equal(classes.labels_of([5, 6], [2, 0]), [0, 2])
        mixed = classes.sample(8, **QUICK)
        for label in range(3):
            assert near(classes.sample(8, labels=[label], **QUICK)[label::3], mixed[label::3])
        assert not near(classes.sample(8, labels=[1], **QUICK), classes.sample(8, labels=[2], **QUICK))

    def test_guidance(self, classes):
        plain = classes.sample(6, **QUICK)
        assert near(classes.sample(6, guidance_scale=1.0, **QUICK), plain)
        strong = classes.sample(6, guidance_scale=4.0, **QUICK)
        assert not near(strong, plain)
        assert near(classes.sample(6, guidance_scale=4.0, guidance_interval=(50, 60), **QUICK), plain)


class TestEdits:
    def test_variations_differ_and_keep_little_at_large_t(self, run):
        same = PICTURES[:1].repeat(4, axis=0)
        found = run.vary(same, 20, num_steps=4)
        assert found.shape == same.shape
        assert len({image.tobytes() for image in found}) == 4
        assert near(run.vary(same[:2], 20, num_steps=4), found[:2])
        assert not near(run.vary(same, 20, seed=1, num_steps=4), found)

    def test_edits_work_in_batches(self, run):
        pictures = RNG.integers(0, 256, (20, 8, 8, 1), np.uint8)
        assert near(run.vary(pictures, 10, batch_size=8, num_steps=4), run.vary(pictures, 10, num_steps=4))

    def test_inpainting_leaves_the_rest_to_the_bit(self, run):
        mask = np.zeros((8, 8), bool)
        mask[2:5, 3:] = True
        found = run.inpaint(PICTURES, mask, times=2, jump=2, **QUICK)
        np.testing.assert_array_equal(found[:, ~mask], PICTURES[:, ~mask])
        assert np.any(found[:, mask] != PICTURES[:, mask])
        masks = np.stack([mask, ~mask, mask])
        each = run.inpaint(PICTURES, masks, times=2, jump=2, **QUICK)
        assert near(each[[0, 2]], found[[0, 2]])
        np.testing.assert_array_equal(each[1, mask], PICTURES[1, mask])

    def test_denoising_estimates_t(self, run):
        noisy = np.clip(np.full((4, 8, 8, 1), 127) + RNG.normal(0, 30, (4, 8, 8, 1)), 0, 255).astype(np.uint8)
        t = run.estimate_t(noisy)
        s_by_a = np.exp(-0.5 * np.asarray(run.schedule.log_snr))
        assert s_by_a[t] * 127.5 == pytest.approx(30, rel=0.5)
        np.testing.assert_array_equal(run.denoise(noisy, num_steps=2), run.denoise(noisy, t, num_steps=2))

    def test_interpolations(self, run):
        found = run.interpolate(PICTURES[0], PICTURES[1], [0.0, 0.5, 1.0], t=20, num_steps=4)
        assert found.shape == (3, 8, 8, 1)
        assert len({image.tobytes() for image in found}) == 3
        arc = run.interpolate_latents(PICTURES[0], PICTURES[1], [0.0, 1.0])
        assert arc.shape == (2, 8, 8, 1)

    def test_stages_end_at_the_sample(self, run):
        stages = run.progressive(3, seed=5, num_stages=4, num_steps=8)
        assert stages.shape == (4, 3, 8, 8, 1)
        assert near(stages[-1], run.sample(3, seed=5, num_steps=8))
        noisy = run.progressive(3, seed=5, num_stages=4, of="x", num_steps=8)
        assert near(noisy[-1], stages[-1])
        assert not near(noisy[0], stages[0])

    def test_coarse_to_fine(self, run):
        assert run.coarse_to_fine(3, 30, num_steps=8).shape == (3, 8, 8, 1)

    @pytest.mark.parametrize(
        ("call", "said"),
        [
            (lambda run: run.sample(0), "the number of images is 0; at least 1"),
            (lambda run: run.sample(1, labels=[1]), "not class-conditional"),
            (lambda run: run.sample(1, num_steps=41), "num_steps is 41; accepted: 1 to 40"),
            (lambda run: run.sample(1, sampler="euler"), "sampler is 'euler'; accepted: ddpm, ddim"),
            (lambda run: run.sample(1, eta=0.5), "sampler 'ddpm' takes no eta"),
            (lambda run: run.sample(1, timesteps=[3, 5]), r"the timesteps are \[3, 5\]; accepted: descending"),
            (lambda run: run.vary(PICTURES, 40), "t is 40; accepted: 0 to 39"),
            (
                lambda run: run.vary(PICTURES[0], 4),
                r"of shape \(8, 8, 1\); accepted: uint8 of shape \(N, 8, 8, 1",
            ),
            (lambda run: run.vary(PICTURES / 255, 4), "the pictures are float64"),
            (lambda run: run.inpaint(PICTURES, np.ones((4, 8))), r"the mask has shape \(4, 8\)"),
            (lambda run: run.progressive(1, num_stages=41), "num_snapshots is 41; accepted: 0, or 2 to 40"),
            (
                lambda run: run.vary(PICTURES, 5, guidance_scale=2.0),
                "guidance_scale is 2.0; other than 1 it needs a run",
            ),
            (lambda run: run.sample(1, guidance_interval=(3,)), r"guidance_interval is \(3,\); accepted: the lowest"),
            (lambda run: run.sample(1, dynamic_threshold=2.0), "dynamic_threshold is 2.0; accepted: above 0 to 1"),
        ],
    )
    def test_refused(self, run, call, said):
        with pytest.raises(UserError, match=said):
            call(run)

    def test_the_config_s_steps_fit_any_start(self):
        run = make_run(num_steps=20)
        assert run.vary(PICTURES, 5).shape == PICTURES.shape
        assert run.interpolate(PICTURES[0], PICTURES[1], [0.0, 1.0], t=3).shape == (2, 8, 8, 1)

    def test_latents_are_deterministic_whatever_the_config(self):
        plain, noisy = make_run(), make_run(sampler="ddim", eta=0.7)
        a, b = (run.interpolate_latents(PICTURES[0], PICTURES[1], [0.0, 0.4], num_steps=8) for run in (plain, noisy))
        np.testing.assert_array_equal(a, b)

    def test_classes_in_edits(self, classes):
        for edit in (lambda **o: classes.vary(PICTURES, 30, **o), lambda **o: classes.coarse_to_fine(3, 20, **o)):
            first = edit(labels=[0], num_steps=4)
            assert not near(edit(labels=[1], num_steps=4), first)
            assert not near(edit(labels=[0], guidance_scale=4.0, num_steps=4), first)
        with pytest.raises(UserError, match="guidance needs the classes"):
            classes.vary(PICTURES, 5, guidance_scale=2.0)
        alone = make_run(class_conditional=True)
        with pytest.raises(UserError, match="knows images by their class alone"):
            alone.vary(PICTURES, 5)
        assert alone.vary(PICTURES, 5, labels=np.array([1, 2])).shape == PICTURES.shape

    def test_class_that_does_not_exist(self, classes):
        with pytest.raises(UserError, match="class 3 does not exist; this run has classes 0 to 2"):
            classes.sample(1, labels=[0, 3])


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
            ("interpolate", 2, {"ts": ["5", "20"], "weights": [], "latents": False}, (13, 2)),
            ("interpolate", 2, {"ts": [], "weights": ["0", "0.5", "1"], "latents": True}, (5, 1)),
            ("vary", 3, {"ts": ["2", "20"], "num_images": 4}, (5, 6)),
            ("denoise", 2, {"ts": []}, (2, 2)),
            ("inpaint", 2, {"mask": "mask.png", "jump": 2, "times": 2, "num_images": 3}, (4, 2)),
            ("progressive", 0, {"num_images": 2, "num_stages": None, "of": "x_0"}, (4, 2)),
            ("coarse_to_fine", 0, {"num_images": 3, "ts": ["39", "20", "1"]}, (3, 3)),
        ],
    )
    def test_modes_end_in_a_picture(self, run, files, tmp_path, mode, inputs, arguments, tiles, capsys):
        if inputs:
            arguments = {"inputs": files[:inputs], **arguments}
        if "mask" in arguments:
            arguments["mask"] = str(tmp_path / "mask.png")
        found = getattr(command_line, mode)(run, tmp_path, seed=1, out=None, options={"num_steps": 4}, **arguments)
        assert found.parent == tmp_path / "samples"
        assert Image.open(found).size == tuple(66 * count + 2 for count in tiles)
        assert str(found) in capsys.readouterr().out
        if mode == "progressive":
            assert Image.open(found.with_suffix(".gif")).n_frames == 4

    def test_a_grid_has_a_row_a_class(self, classes, tmp_path):
        path = command_line.sample(
            classes,
            tmp_path,
            num_images=None,
            seed=0,
            batch_size=None,
            classes=["2", "0"],
            output="grid",
            out=str(tmp_path / "grid.png"),
            options=QUICK,
        )
        tiles = np.asarray(Image.open(path))[2:, 2:].reshape(2, 66, 8, 66).swapaxes(1, 2)[:, :, :64:8, :64:8]
        assert near(tiles[1, :, :, :, None], classes.sample(16, labels=[2, 0], **QUICK)[1::2])

    def shards(self, run, folder, **changes):
        arguments = {
            "first": 0,
            "last": 24,
            "seed": 1,
            "shard_size": 10,
            "part": (0, 1),
            "batch_size": 8,
            "classes": [],
        }
        arguments |= {"options": QUICK, "out": str(folder)} | changes
        return command_line.sample_shards(run, folder, **arguments)

    def test_shards_are_made_once_and_shared(self, run, tmp_path):
        self.shards(run, tmp_path, part=(1, 2))
        (second,) = sorted(tmp_path.iterdir())
        assert second.name == "images_000000010-000000019.npz"
        before = second.stat().st_mtime_ns
        self.shards(run, tmp_path)
        assert second.stat().st_mtime_ns == before
        files = [np.load(path) for path in sorted(tmp_path.iterdir())]
        assert [len(file["image"]) for file in files] == [10, 10, 10]
        np.testing.assert_array_equal(np.concatenate([file["index"] for file in files]), np.arange(30))
        assert near(np.concatenate([file["image"] for file in files]), run.sample(30, seed=1, batch_size=8, **QUICK))
        self.shards(run, tmp_path, first=15, last=39)
        assert len(list(tmp_path.iterdir())) == 4
        (tmp_path / "images_000000000-000000009.npz").write_bytes(b"cut off")
        self.shards(run, tmp_path)
        np.testing.assert_array_equal(np.load(tmp_path / "images_000000000-000000009.npz")["image"], files[0]["image"])

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"seed": 2}, "made otherwise (seed: 1 -> 2); choose another --out"),
            ({"options": {"num_steps": 5}}, "(num_steps: 4 -> 5)"),
            ({"shard_size": 7}, "a shard of another size"),
            ({"first": 5, "last": 3}, "--images is 5-3; accepted: FIRST-LAST"),
            ({"shard_size": 0}, "--shard_size is 0; at least 1"),
            ({"part": (2, 2)}, "--part is 2/2; accepted: 0/N to N-1/N"),
        ],
    )
    def test_refused_shards(self, run, tmp_path, changes, said):
        self.shards(run, tmp_path, last=9)
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(UserError) as caught:
            self.shards(run, tmp_path, **changes)
        assert said in str(caught.value)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_a_row_that_lacks_images_ends_in_white(self, classes, tmp_path):
        arguments = {"seed": 0, "batch_size": None, "output": "grid", "out": str(tmp_path / "a.png"), "options": QUICK}
        path = command_line.sample(classes, tmp_path, num_images=5, classes=["2", "0", "1"], **arguments)
        tiles = np.asarray(Image.open(path))[2:, 2:].reshape(3, 66, 2, 66).swapaxes(1, 2)
        assert [bool(np.all(tiles[row, 1] == 255)) for row in range(3)] == [False, False, True]

    def test_pictures_go_to_a_new_folder(self, run, tmp_path):
        arguments = {"seed": 0, "batch_size": None, "output": "png", "out": str(tmp_path / "new"), "options": QUICK}
        path = command_line.sample(run, tmp_path, num_images=3, classes=[], **arguments)
        assert [p.name for p in sorted(path.iterdir())] == [f"{i:06d}.png" for i in range(3)]
        with pytest.raises(UserError, match="is there and not empty"):
            command_line.sample(run, tmp_path, num_images=2, classes=[], **arguments)

    def test_evaluation_adds_up(self, run, files, tmp_path):
        """Against given images, with the history kept; samples first, then a folder with itself."""
        real = tmp_path / "real.npz"
        np.savez(real, image=RNG.integers(0, 256, (40, 8, 8, 1), np.uint8))
        arguments = {"features": "digits", "batch_size": 16, "seed": 0, "against": str(real)}
        first = command_line.evaluate(run, tmp_path, num_images=20, generated=None, options=QUICK, **arguments)
        again = command_line.evaluate(run, tmp_path, num_images=None, generated=str(real), options={}, **arguments)
        assert (first["num_real"], first["num_generated"]) == (40, 20)
        assert (first["step"], first["num_steps"], first["against"]) == (3, 4, str(real))
        name = "Frechet distance (digits classifier)"
        assert first[name] > 1
        assert again[name] == pytest.approx(0, abs=1e-6)
        assert (again["precision"], again["recall"]) == (1, 1)
        history = json.loads((tmp_path / "evaluation.json").read_text())
        assert [entry[name] for entry in history] == [first[name], again[name]]
        assert "FID" not in (tmp_path / "evaluation.md").read_text()
        for changes, said in (
            ({"features": "none.pth"}, "fetch https://"),
            ({"generated": "none"}, "--generated:"),
            ({"against": "none"}, "--against:"),
        ):
            with pytest.raises(UserError, match=said):
                command_line.evaluate(
                    run, tmp_path, **{"num_images": 2, "generated": str(real), "options": QUICK, **arguments, **changes}
                )

    @pytest.mark.parametrize(
        ("inputs", "said"),
        [
            (["none.png"], "--input 'none.png' cannot be read as a picture"),
            (["data:x"], "--input is 'x'; accepted: numbers"),
            ([], "--input has 0 values; accepted: 1 or more"),
        ],
    )
    def test_refused_inputs(self, run, tmp_path, inputs, said):
        with pytest.raises(UserError) as caught:
            command_line.vary(run, tmp_path, inputs=inputs, ts=[], num_images=1, seed=0, out=None, options=QUICK)
        assert said in str(caught.value)

    @pytest.mark.parametrize(
        ("call", "said"),
        [
            (
                lambda: command_line.parse_range("images", "5", "-"),
                "--images is '5'; accepted: two numbers such as 0-4",
            ),
            (lambda: command_line.parse_range("part", "-1/4", "/"), "--part is '-1/4'"),
            (lambda: command_line.parse_numbers("t", ["5", "x"]), "--t is '5,x'; accepted: numbers"),
        ],
    )
    def test_refused_flags(self, call, said):
        with pytest.raises(UserError) as caught:
            call()
        assert said in str(caught.value)
