"""The command line as its users meet it: real processes on real files."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image
from runs import CAPTIONED, PATIENCE, ROOT, STEPS, assert_same_checkpoint, checkpoint, in_two_processes, metrics
from sklearn.datasets import load_digits

import ddpm_jax
from ddpm_jax.interop import workdirs
from ddpm_jax.runtime import parallel
from ddpm_jax.runtime.files import read_json_lines


@pytest.mark.slow
class TestTraining:
    def test_leaves_a_whole_run(self, trained):
        workdir, output = trained
        assert {p.name for p in workdir.iterdir()} == {
            *("config.json", "dataset.json", "environment.json", "history.jsonl", "metrics.jsonl"),
            *("report.html", "checkpoints", "samples", "tensorboard"),
        }
        assert sorted(p.name for p in (workdir / "samples").iterdir()) == [
            "data.png",
            "denoising.png",
            "final.png",
            "step_00000012.png",
        ]
        assert Image.open(workdir / "samples" / "final.png").size == (3 * 66 + 2,) * 2
        assert Image.open(workdir / "samples" / "denoising.png").size == (10 * 66 + 2, 8 * 66 + 2)
        assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [12, 18, 24]
        dataset = json.loads((workdir / "dataset.json").read_text())
        assert dataset["num_images"] == 1797
        assert [event["event"] for event in read_json_lines(workdir / "history.jsonl")] == ["started", "finished"]
        assert json.loads((workdir / "environment.json").read_text())["packages"]["jax"] == jax.__version__
        assert list((workdir / "tensorboard").glob("events*"))
        assert re.search(r"step 12/24 .*loss \d.* images/s.* left", output)
        assert "warning" not in output.lower(), output
        assert re.search(r"\nwrote: \S+/report.html\nnext:  python main.py --mode=sample --workdir=\S+\n\Z", output)

    def test_metrics_tell_what_the_issue_of_training_is(self, trained):
        lines = metrics(trained[0])
        assert [line["step"] for line in lines] == list(range(2, STEPS + 1, 2))
        quarters = {f"loss_t_quarter_{i}" for i in range(1, 5)}
        assert {"loss", "grad_norm", "param_norm", "learning_rate", "images_per_second", *quarters} <= set(lines[-1])
        assert lines[-1]["loss"] < lines[0]["loss"]

    def test_evaluation_on_the_way(self, trained, call, tmp_path):
        """Is logged, and changes nothing of the training."""
        flags = ("every_steps=12", "likelihood_images=16", "num_images=32", "num_steps=4")
        status, output = call(f"--workdir={tmp_path}", *(f"--config.evaluate.{flag}" for flag in flags))
        assert status == 0, output
        found = [line for line in metrics(tmp_path) if "bits_per_dim" in line]
        assert [line["step"] for line in found] == [12, 24]
        for line in found:
            assert 0 < line["bits_per_dim_error"] < line["bits_per_dim"]
            assert line["frechet_distance_digits"] > 0
        assert found[1]["bits_per_dim"] < found[0]["bits_per_dim"]
        assert_same_checkpoint(tmp_path, trained[0])
        # As if it had been killed after the last checkpoint and before the evaluation.
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
        assert metrics(tmp_path)[-1] != found[1]
        status, output = call(f"--workdir={tmp_path}", *(f"--config.evaluate.{flag}" for flag in flags))
        assert status == 0, output
        assert metrics(tmp_path)[-1] | {"time": 0} == found[1] | {"time": 0}

    def test_divergence_stops_and_keeps_the_last_good_checkpoint(self, call, tmp_path):
        flags = (
            "--config.optimizer.learning_rate=1e30",
            "--config.optimizer.warmup_steps=7",
            "--config.checkpoint.every_steps=1",
        )
        status, output = call(f"--workdir={tmp_path}", *flags)
        assert status == 1
        assert re.search(r"error: training diverged at step \d+: loss (nan|inf).*, gradient norm \S+", output)
        steps = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
        assert steps
        for leaf in jax.tree.leaves(checkpoint(tmp_path, max(steps))["params"]):
            assert np.all(np.isfinite(leaf))

    @pytest.mark.eight
    def test_eight_devices(self, trained, call, tmp_path):
        few = ("--config.log.sample_every_steps=0", "--config.sample.num_images=8", "--config.sample.num_steps=5")
        status, output = call(f"--workdir={tmp_path}", *few, devices=8)
        assert status == 0, output
        assert "8 cpu device(s)" in output
        ours, reference = checkpoint(tmp_path)["params"], checkpoint(trained[0])["params"]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ours, reference)

    def test_several_steps_at_once_on_a_mesh_of_two_axes(self, trained, call, tmp_path):
        """From a checkpoint within a group of steps, to an end within another; logged where the groups end."""
        shutil.copytree(trained[0], tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "24")
        flags = ("--config.train.steps_per_dispatch=5", "--config.mesh.fsdp=2")
        status, output = call(f"--workdir={tmp_path / 'run'}", *flags, devices=2)
        assert status == 0, output
        assert "going on from the checkpoint of step 18" in output
        ours, reference = checkpoint(tmp_path / "run")["params"], checkpoint(trained[0])["params"]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), ours, reference)
        assert [line["step"] for line in metrics(tmp_path / "run")] == [*range(2, 19, 2), 20, 24]

    @pytest.mark.eight
    def test_two_processes_that_divide_the_state(self, start, call, tmp_path):
        """Each keeps a part of the wide layers; one process goes on from what the two have saved."""
        flags = (
            "--config.model.channels=48",
            "--config.train.num_steps=6",
            "--config.checkpoint.every_steps=3",
            "--config.log.every_steps=1",
            "--config.log.sample_every_steps=3",
            "--config.log.sample_steps=2",
            "--config.sample.num_images=4",
            "--config.sample.num_steps=2",
        )
        whole, divided = tmp_path / "whole", tmp_path / "divided"
        status, output = call(f"--workdir={whole}", *flags)
        assert status == 0, output
        evaluation = ("every_steps=3", "likelihood_images=8", "num_images=8", "num_steps=2")
        more = ("--config.mesh.data=1", "--config.mesh.fsdp=-1", *(f"--config.evaluate.{flag}" for flag in evaluation))
        in_two_processes(start, f"--workdir={divided}", *flags, *more)
        params = ddpm_jax.load(divided).params
        shardings = parallel.state_shardings(parallel.make_mesh(data=2, fsdp=4), params)
        assert not all(sharding.is_fully_replicated for sharding in jax.tree.leaves(shardings))
        assert [line["step"] for line in metrics(divided) if "bits_per_dim" in line] == [3, 6]
        for name in ("step_00000003.png", "final.png"):
            pictures = [np.asarray(Image.open(workdir / "samples" / name)) for workdir in (whole, divided)]
            assert np.max(np.abs(np.subtract(*pictures, dtype=int))) <= 1
        shutil.rmtree(divided / "checkpoints" / "6")
        status, output = call(f"--workdir={divided}", *flags)
        assert status == 0, output
        assert "going on from the checkpoint of step 3" in output
        losses = [[line["loss"] for line in metrics(workdir) if "loss" in line] for workdir in (whole, divided)]
        assert len(losses[0]) == 6
        np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
class TestSampling:
    @pytest.mark.parametrize("output", ["grid", "png", "npz"])
    def test_writes_what_the_library_gives(self, trained, call, tmp_path, output):
        workdir, _ = trained
        out = tmp_path / {"grid": "a.png", "png": "folder", "npz": "a.npz"}[output]
        flags = (f"--workdir={workdir}", "--num_images=5", "--seed=3", "--num_steps=10", f"--output={output}")
        status, text = call("--mode=sample", *flags, f"--out={out}", config=None)
        assert status == 0, text
        expected = ddpm_jax.load(workdir).sample(5, seed=3, num_steps=10)
        assert expected.shape == (5, 8, 8, 1)
        if output == "grid":
            assert Image.open(out).size == (3 * 66 + 2, 2 * 66 + 2)
            return
        if output == "png":
            pictures = np.stack([np.asarray(Image.open(path))[..., None] for path in sorted(out.iterdir())])
        else:
            pictures = np.load(out)["image"]
        # The library runs on 8 devices here, the command on one.
        assert np.max(np.abs(pictures.astype(int) - expected)) <= 1

    def test_image_depends_on_seed_and_number_alone(self, trained):
        run = ddpm_jax.load(trained[0])
        many = run.sample(20, seed=1, num_steps=10, batch_size=8)
        few = run.sample(3, seed=1, num_steps=10)
        assert np.max(np.abs(many[:3].astype(int) - few)) <= 1
        assert np.any(run.sample(3, seed=2, num_steps=10) != few)

    def test_shards_go_on_where_they_stopped(self, trained, call, tmp_path):
        """Killed on the way, then started again: what was there stays, and the images are those of one run."""
        flags = (f"--workdir={trained[0]}", "--images=0-39", "--shard_size=4", "--sampler=ddim", "--num_steps=9")
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        status, text = call("--mode=sample", *flags, f"--out={whole}", config=None)
        assert status == 0, text
        process = subprocess.Popen(
            [sys.executable, "main.py", "--mode=sample", *flags, f"--out={parts}"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + PATIENCE
        while not list(parts.glob("*.npz")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
        first = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.npz")}
        assert first
        status, text = call("--mode=sample", *flags, f"--out={parts}", config=None)
        assert status == 0, text
        names = [path.name for path in sorted(whole.iterdir())]
        assert [path.name for path in sorted(parts.glob("images*"))] == names
        assert all((parts / name).stat().st_mtime_ns == time for name, time in first.items())
        for name in names:
            a, b = np.load(whole / name), np.load(parts / name)
            np.testing.assert_array_equal(a["image"], b["image"])
            assert str(a["settings"]) == str(b["settings"])

    def test_two_processes_make_the_images_of_one(self, trained, start, tmp_path):
        out = tmp_path / "a.npz"
        flags = ("--mode=sample", f"--workdir={trained[0]}", "--num_images=6", "--num_steps=5", "--output=npz")
        outputs = in_two_processes(start, *flags, f"--out={out}", config=None)
        assert str(out) in outputs[0]
        assert str(out) not in outputs[1]
        run = ddpm_jax.load(trained[0])
        expected = run.sample(6, num_steps=5)
        assert np.max(np.abs(np.load(out)["image"].astype(int) - expected)) <= 1
        edit = ("--mode=vary", f"--workdir={trained[0]}", "--input=data:3", "--t=20", "--num_images=5", "--num_steps=4")
        in_two_processes(start, *edit, f"--out={tmp_path / 'vary.png'}", config=None)
        tiles = np.asarray(Image.open(tmp_path / "vary.png"))[2:, 2:].reshape(66, 6, 66).swapaxes(0, 1)[:, :64:8, :64:8]
        expected = run.vary(tiles[:1, ..., None].repeat(5, axis=0), 20, num_steps=4)
        assert np.max(np.abs(tiles[1:, ..., None].astype(int) - expected)) <= 1

    def test_a_finished_run_is_left_as_it_is(self, trained, call, tmp_path):
        workdir = shutil.copytree(trained[0], tmp_path / "run")
        before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
        status, output = call(f"--workdir={workdir}")
        assert status == 0, output
        assert "finished before; pictures are in" in output
        after = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
        changed = {path.name for path in {*before, *after} if before.get(path) != after.get(path)}
        assert changed <= {"environment.json"}
        status, output = call(f"--workdir={workdir}", "--config.sample.num_images=4")
        assert status == 0, output
        assert "sampling 4 images" in output

    def test_edits_training_images(self, trained, call, data_dir, tmp_path):
        """As a command, from pictures of the data set."""
        out = tmp_path / "a.png"
        flags = (f"--workdir={trained[0]}", "--input=data:0,data:9", "--t=20", "--weights=0,1", "--num_steps=5")
        status, text = call("--mode=interpolate", *flags, f"--out={out}", config=None)
        assert status == 0, text
        tiles = np.asarray(Image.open(out))[2:, 2:].reshape(66, 4, 66).swapaxes(0, 1)[:, :64:8, :64:8]
        digits = load_digits().images * 255 / 16
        assert all(min(np.abs(tile - digit).max() for digit in digits) <= 1 for tile in (tiles[0], tiles[3]))
        status, text = call("--mode=interpolate", f"--workdir={trained[0]}", "--input=data:0", config=None)
        assert (status, text) == (1, "error: --input has 1 values; accepted: 2\n")

    def test_each_command_has_a_file_and_the_report_shows_them(self, trained, call, tmp_path):
        workdir = shutil.copytree(trained[0], tmp_path / "run")
        before = set((workdir / "samples").iterdir())
        for number in (1, 2):
            flags = (f"--input=data:{number}", "--t=20", "--num_images=1", "--num_steps=4")
            status, text = call("--mode=vary", f"--workdir={workdir}", *flags, config=None)
            assert status == 0, text
        made = sorted(path.name for path in set((workdir / "samples").iterdir()) - before)
        assert made == [
            f"vary_step_00000024_seed_0_input_data-{number}_num_images_1_num_steps_4_t_20.png" for number in (1, 2)
        ]
        page = (workdir / "report.html").read_text()
        assert all(name in page for name in made)

    def test_step_and_weights_can_be_chosen(self, trained):
        newest, older, raw = (ddpm_jax.load(trained[0], **options) for options in ({}, {"step": 12}, {"raw": True}))
        assert (newest.step, older.step, raw.ema_decay) == (STEPS, 12, None)
        reference = checkpoint(trained[0])
        jax.tree.map(np.testing.assert_array_equal, newest.params, reference["ema_0.99"])
        jax.tree.map(np.testing.assert_array_equal, raw.params, reference["params"])
        jax.tree.map(np.testing.assert_array_equal, older.params, checkpoint(trained[0], 12)["ema_0.99"])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"step": 7}, "no checkpoint of step 7; accepted: [12, 18, 24]"),
            ({"ema_decay": 0.5}, "no average of decay 0.5; it has 0.99"),
        ],
    )
    def test_refuses_what_is_not_there(self, trained, options, message):
        with pytest.raises(ddpm_jax.UserError, match=re.escape(message)):
            ddpm_jax.load(trained[0], **options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_images": 0}, "at least 1"),
            ({"num_steps": 51}, "num_steps is 51; accepted: 1 to 50"),
            ({"labels": [1]}, "not class-conditional"),
        ],
    )
    def test_refuses_bad_requests(self, trained, options, message):
        with pytest.raises(ddpm_jax.UserError, match=message):
            ddpm_jax.load(trained[0]).sample(**options)


@pytest.mark.slow
class TestCaptions:
    PROMPTS = ("forty-two", "seventeen, \u0627\u062b\u0646\u0627\u0646")

    def run(self, call, mode, *flags):
        status, output = call(f"--mode={mode}", *flags, config=None)
        assert status == 0, output
        return output

    def test_a_run_keeps_its_tokenizer_and_trains_its_encoder(self, captioned):
        workdir, output = captioned
        dataset = json.loads((workdir / "dataset.json").read_text())
        assert len(dataset["shown_captions"]) == 64
        assert (workdir / "tokenizer.json").exists()
        assert "tokenizer" not in dataset
        parts = checkpoint(workdir)
        assert parts["params"].keys() == parts["ema_0.99"].keys() == {"net", "encoder"}
        assert "warning" not in output.lower(), output

    def test_goes_on_to_the_bit(self, captioned, call, tmp_path):
        workdir = shutil.copytree(captioned[0], tmp_path / "run")
        shutil.rmtree(workdir / "checkpoints" / "24")
        status, output = call(f"--workdir={workdir}", config=CAPTIONED)
        assert status == 0, output
        assert "going on from the checkpoint of step 18" in output
        assert_same_checkpoint(workdir, captioned[0])
        assert metrics(workdir)[-1]["loss"] == metrics(captioned[0])[-1]["loss"]

    def test_pictures_of_prompts(self, captioned, call, tmp_path):
        """A grid with a row a prompt, a file each that says what it is, and arrays: all of the same images."""
        flags = (f"--workdir={captioned[0]}", "--num_images=5", "--seed=3", "--num_steps=4", "--guidance_scale=2")
        lines = tmp_path / "prompts.txt"
        lines.write_text("\ufeff" + "\n\n  ".join(self.PROMPTS) + "\n", "utf-8")
        grid, folder, arrays = (tmp_path / name for name in ("a.png", "folder", "a.npz"))
        each = [f"--prompt={prompt}" for prompt in self.PROMPTS]
        self.run(call, "sample", *flags, *each, f"--out={grid}")
        self.run(call, "sample", *flags, *each, "--negative_prompt=", "--output=png", f"--out={folder}")
        self.run(call, "sample", *flags, f"--prompts={lines}", "--output=npz", f"--out={arrays}")
        expected = np.load(arrays)
        assert expected["prompt"].tolist() == [self.PROMPTS[i % 2] for i in range(5)]
        tiles = np.asarray(Image.open(grid))[2:, 2:].reshape(2, 66, 3, 66).swapaxes(1, 2)[:, :, :64:8, :64:8]
        for number, image in enumerate(expected["image"][..., 0]):
            np.testing.assert_array_equal(tiles[number % 2, number // 2], image)
            with Image.open(folder / f"{number:06d}.png") as picture:
                np.testing.assert_array_equal(picture, image)
                said = picture.text
            prompt = self.PROMPTS[number % 2]
            assert said["Description"] == prompt
            assert said["Software"].startswith("ddpm_jax ")
            assert said["parameters"].splitlines()[:2] == [prompt, "Negative prompt: "]
            facts = "Steps: 4, Sampler: dpmpp_2m_sde, CFG scale: 2.0, Seed: 3, Size: 8x8"
            assert said["parameters"].splitlines()[2] == f"{facts}, Model: captioned, step 24, EMA 0.99"
            settings = json.loads(said["settings"])
            assert (settings["seed"], settings["index"], settings["num_steps"]) == (3, number, 4)
            assert (settings["prompts"], settings["negative_prompts"]) == (list(self.PROMPTS), [""])
        assert Image.open(grid).text["Description"] == "\n".join(self.PROMPTS)

    def test_shards_hold_prompts_and_go_on(self, captioned, call, tmp_path):
        flags = (f"--workdir={captioned[0]}", "--shard_size=4", "--num_steps=4", f"--out={tmp_path}")
        each = [f"--prompt={prompt}" for prompt in self.PROMPTS]
        self.run(call, "sample", *flags, *each, "--images=0-3")
        assert "shards that exist already: 1" in self.run(call, "sample", *flags, *each, "--images=0-7")
        files = [np.load(path) for path in sorted(tmp_path.iterdir())]
        assert [file["prompt"].tolist() for file in files] == [[*self.PROMPTS] * 2] * 2
        status, output = call("--mode=sample", *flags, "--prompt=another", "--images=0-7", config=None)
        assert (status, output.count("\n")) == (1, 1)
        assert "holds images made otherwise (prompts: ['forty-two', " in output

    @pytest.mark.parametrize(
        ("mode", "flags", "tiles"),
        [
            ("interpolate", ("--prompt=one", "--weights=0,0.5,1", "--num_images=2"), (3, 2)),
            ("vary", ("--input=data:3", "--t=20", "--num_images=1"), (2, 1)),
            ("inpaint", ("--input=data:3", "--mask={mask}", "--num_images=1"), (2, 1)),
            ("progressive", ("--num_images=2", "--num_stages=4"), (4, 2)),
        ],
    )
    def test_other_modes_take_a_prompt(self, captioned, call, tmp_path, mode, flags, tiles):
        mask, out = tmp_path / "mask.png", tmp_path / "a.png"
        Image.fromarray(np.repeat(np.array([[0], [255]], np.uint8), 4, axis=0).repeat(8, axis=1)).save(mask)
        flags = [flag.format(mask=mask) for flag in flags]
        self.run(call, mode, f"--workdir={captioned[0]}", "--prompt=two", "--num_steps=4", f"--out={out}", *flags)
        picture = Image.open(out)
        assert picture.size == tuple(66 * count + 2 for count in tiles)
        assert picture.text["Description"].splitlines()[0] == "two"

    def test_exported_and_imported_it_samples_the_same(self, captioned, tmp_path):
        """By the same weights, of the same tokens."""
        run = ddpm_jax.load(captioned[0])
        file = workdirs.export_weights(run, tmp_path / "a.safetensors")
        again = ddpm_jax.load(workdirs.import_weights(str(file), tmp_path / "again"))
        options = {"seed": 1, "prompts": [*self.PROMPTS, "", "forty " * 20]}
        assert again.settings(**options) == {**run.settings(**options), "step": again.step}
        found, expected = (each.request(prompts=options["prompts"]).condition for each in (again, run))
        jax.tree.map(np.testing.assert_array_equal, found.of_images(range(4)), expected.of_images(range(4)))
        assert found.shown == expected.shown

    def test_is_answered_in_one_sentence(self, trained, captioned, call, tmp_path):
        for run, flags, message in (
            (trained, ("--mode=sample", "--prompt=one"), "did not learn from captions, so it takes no prompt"),
            (captioned, ("--mode=sample", f"--prompts={tmp_path / 'none'}"), "cannot be read: No such file"),
            (
                captioned,
                ("--mode=sample", "--prompt=a", "--negative_prompt=b"),
                "does nothing at a guidance_scale of 1",
            ),
            (captioned, ("--mode=export", f"--out={tmp_path / 'new'}"), "accepted: --out of a .safetensors file"),
        ):
            status, output = call(f"--workdir={run[0]}", *flags, config=None)
            assert (status, output.count("\n")) == (1, 1), output
            assert output.startswith("error: ")
            assert message in output
        assert not (tmp_path / "new").exists()


class TestPrepare:
    def test_says_what_and_where_the_images_are(self, call, data_dir):
        status, output = call("--mode=prepare")
        assert status == 0, output
        assert "1,797 images of 8x8x1" in output
        assert f"in {data_dir}/digits/" in output

    def test_an_image_that_cannot_be_read(self, call, tmp_path):
        (tmp_path / "a.png").write_bytes(b"no picture")
        folder = ("--config.data.source=folder", f"--config.data.path={tmp_path}")
        status, output = call("--mode=prepare", *folder)
        assert status == 1
        assert re.match(
            r"error: 1 of 1 images in .* cannot be read, the first 'a.png': it is not a picture of a known format, or "
            "damaged; remove",
            output.splitlines()[-1],
        )


class TestInstalled:
    """`python -m ddpm_jax` away from the source tree, with the configs that come with the package."""

    def call(self, folder, *flags):
        command = [sys.executable, "-m", "ddpm_jax", *flags]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
        return done.returncode, done.stdout + done.stderr

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["digits_classes", "configs/digits_classes.py"])
    def test_finds_the_configs(self, tmp_path, name):
        network = ("model.channels=8", "model.num_groups=4", "model.channel_multipliers=(1,)")
        small = (*network, "train.num_steps=1", "train.batch_size=8", "sample.num_images=8", "sample.num_steps=2")
        flags = (f"--config={name}", "--workdir=run", *(f"--config.{field}" for field in small))
        status, output = self.call(tmp_path, *flags, "--config.model.middle_attention=False")
        assert status == 0, output
        assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["label_dropout"] == 0.15

    def test_names_them(self, tmp_path):
        assert self.call(tmp_path, "--config=cifar11") == (
            1,
            "error: --config is 'cifar11', which is not a file; configs/ has captions.py, captions_small.py, "
            "celebahq256.py, cifar10.py, cifar10_article.py, digits.py, digits_classes.py, finetune.py, "
            "folder.py, folder_small.py, lsun_bedroom.py, lsun_cat.py, lsun_church.py, numbers.py, "
            "numbers_autoencoder.py, numbers_base.py, numbers_clip.py, numbers_decoder.py, numbers_latent.py, "
            "numbers_prior.py, numbers_sr.py\n",
        )

    def test_a_file_that_is_no_config(self, tmp_path):
        (tmp_path / "mine.py").touch()
        status, output = self.call(tmp_path, "--config=mine.py", "--workdir=run")
        assert status == 1
        assert output.startswith("error: the file of --config has no function get_config")

    def test_help_lists_the_flags(self, tmp_path):
        status, output = self.call(tmp_path, "--help")
        assert status == 0
        assert output.startswith("ddpm_jax trains diffusion models")


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpshort", "--helpfull"])
def test_help_is_no_failure(call, flag):
    status, output = call(flag, config=None)
    assert status == 0
    assert ("--guidance_scale" if flag == "--helpfull" else "--mode=sample --help lists") in output


def test_help_of_a_mode(call):
    status, output = call("--mode=inpaint", "--help", config=None)
    assert status == 0
    assert "--mask " in output
    assert "--topology" not in output


def test_without_flags_it_says_what_to_type(call):
    status, output = call(config=None)
    assert status == 0
    assert "python main.py --config=configs/digits.py --workdir=runs/digits" in output


BAD = [
    (["--config.train.batch_sise=3"], "'train.batch_sise' does not exist. Did you mean 'train.batch_size'?"),
    (["--config.trian.batch_size=3"], "'trian.batch_size' does not exist. Did you mean 'train.batch_size'?"),
    (["--config.optimizer.options.b1=0.5"], "is set as a whole: --config.optimizer.options='{\"b1\": 0.5}'"),
    (["--config.train.batch_size=many"], "--config.train.batch_size is 'many'; accepted: a whole number"),
    (["--confg.train.batch_size=3"], "does not exist. Did you mean '--config.train.batch_size'?"),
    (["--workdri=x"], "flag --workdri does not exist. Did you mean '--workdir'?"),
    (["--zzzz"], "flag --zzzz does not exist. --help lists all."),
    (["--mode=sample"], "--config does nothing with --mode=sample"),
    (["--sampler=ddim"], "--sampler does nothing with --mode=train"),
    (["--mode=smaple"], "--mode is 'smaple'; accepted: train, prepare, "),
    (["--mode=smaple"], "plan. Did you mean 'sample'?"),
    (["--output=pgn"], "--output is 'pgn'; accepted: grid, png, npz. Did you mean 'png'?"),
    (["--num_images=x"], "--num_images is 'x'; accepted: a whole number"),
    (["--config.diffusion.num_timesteps=1"], "config.diffusion.num_timesteps is 1 and config.log.sample_steps is 5"),
    (["--config.model.channels=33"], "33 channels cannot be normalised in 4 groups"),
    (["--config.data.height=9", "--config.model.channel_multipliers=(1, 2)"], "9x8 cannot be halved"),
    (["--config.train.batch_size=15"], "must be divisible by the 2 devices"),
    (["--config.data.source=folder"], "data.path is empty"),
    (["--config.data.source=folder", "--config.data.path=none"], "'none' is not a folder"),
    (["--config.data.source=folder", "--config.data.path=tests/training"], "holds no images; accepted: .png"),
    (["--config.data.source=array", "--config.data.path=main.py"], "cannot be read as .npz or .npy"),
    (["--config.evaluate.every_steps=5", "--config.evaluate.num_steps=51"], "config.evaluate.num_steps is 51"),
    (["--config=configs/nope.py"], "'configs/nope.py', which is not a file; configs/ has"),
]


@pytest.mark.slow
class TestEvaluation:
    def test_of_samples_and_of_the_bound(self, trained, call, tmp_path):
        """By a fresh process each time: the second finds the first's samples."""
        flags = ("--mode=evaluate", f"--workdir={trained[0]}", "--num_images=24", "--num_steps=4", "--batch_size=8")
        status, output = call(*flags, "--likelihood=bound", "--likelihood_images=8", config=None)
        assert status == 0, output
        assert re.search(r"Frechet distance \(digits classifier\) +[\d.]+ \([\d.]+ to [\d.]+\)  floor [\d.]+", output)
        assert re.search(r"bits/dim of training images, bound +[\d.]+ \([\d.]+\)", output)
        assert "warning" not in output.lower(), output
        bound = json.loads((trained[0] / "evaluation_bound.json").read_text())
        parts = [bound[name]["mean"] for name in ("prior", "kl", "decoder")]
        assert bound["total"]["mean"] == pytest.approx(sum(parts), rel=1e-6)
        assert len(bound["rate"]) == 50
        for name in ("terms", "rate_distortion"):
            assert Image.open(trained[0] / f"evaluation_{name}.png").size[0] > 500
        status, again = call(*flags, config=None)
        assert status == 0, again
        assert "shards that exist already: 1" in again
        first, second = json.loads((trained[0] / "evaluation.json").read_text())
        name = "Frechet distance (digits classifier)"
        assert first[name] == second[name]
        estimate = "bits/dim of training images, estimated bound"
        assert abs(second[estimate] - first["bits/dim of training images, bound"]) < 1

    def test_of_two_folders_without_a_run(self, call, tmp_path):
        for name, brightness in (("a", 255), ("b", 200)):
            (tmp_path / name).mkdir()
            for i, digit in enumerate(load_digits().images[:30]):
                picture = (digit * (brightness / 16)).astype(np.uint8)
                Image.fromarray(picture).save(tmp_path / name / f"{i:02d}.png")
        paths = (f"--generated={tmp_path / 'b'}", f"--against={tmp_path / 'a'}")
        flags = ("--mode=evaluate", f"--workdir={tmp_path / 'out'}", *paths)
        status, output = call(*flags, "--features=digits", config=None)
        assert status == 0, output
        assert "num_generated" in output
        assert (tmp_path / "out" / "evaluation.md").exists()
        status, output = call(*flags, "--features=digits", "--num_images=3", config=None)
        assert (status, "--num_images does nothing with --mode=evaluate" in output) == (1, True), output


class TestInterchange:
    @pytest.mark.slow
    def test_export_import_and_training_from_there(self, trained, call, tmp_path):
        """Through diffusers' folder and back: the same images; and training goes on from these weights."""
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
        # The warm-up's first step has a learning rate of 0, the others have not.
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
    def test_refused_imports(self, call, tmp_path, flags, message):
        status, output = call(*flags, f"--workdir={tmp_path / 'run'}", config=None)
        assert status == 1
        assert message in output
        assert not list(tmp_path.iterdir())

    @pytest.mark.slow
    def test_weights_of_another_network(self, trained, call, tmp_path):
        status, output = call(
            f"--workdir={tmp_path / 'run'}", f"--init_from={trained[0]}", "--config.model.channels=16"
        )
        assert status == 1
        assert f"--init_from {str(trained[0])!r} has conv_in/bias of shape (8,)" in output
        assert "this config's network has (16,)" in output

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("flag", "said"),
        [
            ("model.num_groups=2", "num_groups 4, this"),
            ("model.skip_scale=0.7071", "skip_scale 1.0, this"),
            ("diffusion.prediction=eps", "'v', this config"),
        ],
    )
    def test_weights_of_another_meaning(self, trained, call, tmp_path, flag, said):
        status, output = call(f"--workdir={tmp_path / 'run'}", f"--init_from={trained[0]}", f"--config.{flag}")
        assert status == 1
        assert f"--init_from {str(trained[0])!r} has {flag.partition('=')[0]}" in output
        assert said in output


@pytest.mark.slow
class TestBadInput:
    @pytest.mark.parametrize(("flags", "message"), BAD)
    def test_is_answered_in_one_sentence_before_compiling(self, call, tmp_path, flags, message):
        status, output = call(f"--workdir={tmp_path / 'run'}", *flags, devices=2)
        assert status != 0
        assert message in output, output
        assert "Traceback" not in output
        assert "compil" not in output
        assert not (tmp_path / "run").exists()

    def test_unwritable_workdir(self, call, tmp_path):
        (tmp_path / "file").touch()
        status, output = call(f"--workdir={tmp_path / 'file' / 'run'}")
        assert (status, output.count("\n")) == (1, 1)
        assert "cannot be written to: Not a directory" in output

    def test_workdir_without_a_run(self, call, tmp_path):
        status, output = call("--mode=sample", f"--workdir={tmp_path}", config=None)
        assert (status, output.count("\n")) == (1, 1)
        assert "holds no run: there is no config.json in it" in output

    def test_another_config_on_the_same_workdir(self, trained, call):
        status, output = call(f"--workdir={trained[0]}", "--config.model.channels=16")
        assert status == 1
        assert "model.channels: 8 -> 16" in output

    def test_broken_image_in_a_folder(self, call, tmp_path):
        pictures = tmp_path / "pictures"
        pictures.mkdir()
        for i in range(20):
            Image.fromarray(np.full((8, 8), 12 * i, np.uint8)).save(pictures / f"{i:02d}.png")
        (pictures / "13.png").write_bytes((pictures / "13.png").read_bytes()[:40])
        flags = ("--config.data.source=folder", f"--config.data.path={pictures}", "--config.train.num_steps=2")
        status, output = call(f"--workdir={tmp_path / 'run'}", *flags)
        assert status == 1
        assert "1 of 20 images" in output
        assert "'13.png'" in output
        status, output = call(f"--workdir={tmp_path / 'run'}", *flags, "--config.data.skip_broken")
        assert status == 0, output
        assert "Skipping 1 of 20 images" in output
        assert "19 images" in output
        assert json.loads((tmp_path / "run" / "dataset.json").read_text())["skipped"] == ["13.png"]
