"""The page of a run: its contents, and its behaviour in a real browser."""

import base64
import html
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from tiny import make_run

from ddpm_jax import report
from ddpm_jax.commands.job import Job
from ddpm_jax.config import default_config
from ddpm_jax.data.sources import open_source
from ddpm_jax.evaluation import results
from ddpm_jax.runtime import images, workdir
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.runtime.files import add_json_line, write_text

STAGES, ROWS = 5, 4


def write_lines(path, count):
    lines = [
        {
            "step": 10 * i,
            "time": 1.8e9 + i,
            "loss": 1.0 / i,
            "loss_t_quarter_1": 2.0 / i,
            "images_per_second": 100.0 + i,
        }
        for i in range(1, count + 1)
    ]
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def change(path, **fields):
    """Changes values in a JSON file; sections are merged."""
    values = json.loads(path.read_text())
    for name, value in fields.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    write_text(path, json.dumps(values))


def shade(value, size=8):
    return np.full((size, size, 1), value, np.uint8)


@pytest.fixture
def run(tmp_path):
    """A workdir with a few of everything; each sample picture has one shade, ten levels per step."""
    folder = tmp_path / "a <run>"
    np.save(tmp_path / "images.npy", np.zeros((5, 8, 8), np.uint8))
    config = default_config()
    config.data.update(source="array", path=str(tmp_path / "images.npy"), height=8, width=8, channels=1)
    config.train.num_steps = 1000
    source = open_source("array", path=config.data.path, height=8, width=8, channels=1)
    workdir.record(workdir.check_writable(folder), config, source.describe())
    write_lines(folder / "metrics.jsonl", 30)
    samples = folder / "samples"
    images.save(samples / "data.png", images.grid(np.zeros((4, 8, 8, 1), np.uint8)))
    for step in range(1, 4):
        images.save(samples / f"step_{100 * step:08d}.png", images.grid(shade(10 * step)[None]))
    stages = np.stack([np.stack([shade(40 * stage + row) for stage in range(STAGES)]) for row in range(ROWS)])
    images.save(samples / "denoising.png", images.grid(stages.reshape(-1, 8, 8, 1), columns=STAGES))
    workdir.note(folder, "started", 0, reached=0, devices="1 x cpu", num_parameters=1234567)
    return folder


def page_of(folder):
    text = report.write(folder).read_text()
    found = re.search(r'<script type="application/json" id="numbers">(.*?)</script>', text, re.DOTALL)
    return text, json.loads(found[1])


class TestWrite:
    def test_says_what_the_run_is(self, run):
        text, _ = page_of(run)
        assert "<h1>a &lt;run&gt;</h1>" in text
        assert "1,234,567 parameters, 128, 256, 256, 256 channels" in text
        assert "5 images of 8x8x1" in text
        assert "in training, or interrupted: step 300 of 1,000" in text
        assert "116 images/s, 0.902 steps/s (median)" in text
        assert '<th scope="row">data.height</th><td>8</td><td>32</td>' in text

    def test_asks_for_nothing_else(self, run):
        text, _ = page_of(run)
        assert not re.findall(r"(?:src|href)=\"(?!data:|#)", text)
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)
        assert "<!--" not in text

    def test_every_picture_has_a_text(self, run):
        text, data = page_of(run)
        assert all(re.search(r'alt="[^"]+"', tag) for tag in re.findall(r"<img[^>]*>", text))
        assert all(picture["alt"] for picture in data["samples"] + data["denoising"])

    def test_the_strip_is_cut_into_its_stages(self, run):
        _, data = page_of(run)
        assert [stage["label"] for stage in data["denoising"]] == [
            *("noise", "stage 2 of 5", "stage 3 of 5", "stage 4 of 5", "image"),
        ]
        for number, stage in enumerate(data["denoising"]):
            pixels = decoded(stage["src"])
            assert set(np.unique(pixels)) == {40 * number + row for row in range(ROWS)} | {255}

    def test_of_many_pictures_the_first_and_the_last_stay(self, run):
        for step in range(4, 101):
            images.save(run / "samples" / f"step_{100 * step:08d}.png", images.grid(shade(step)[None]))
        _, data = page_of(run)
        assert len(data["samples"]) == 24
        assert (data["samples"][0]["label"], data["samples"][-1]["label"]) == ("step 100", "step 10,000")

    def test_a_large_picture_is_made_smaller(self, run):
        noise = np.random.default_rng(0).integers(0, 256, (4, 128, 128, 3), np.uint8)
        path = images.save(run / "samples" / "step_00000400.png", images.grid(noise))
        source = page_of(run)[1]["samples"][-1]["src"]
        assert source.startswith("data:image/webp;base64,")
        assert len(source) < path.stat().st_size
        assert decoded(source).shape[:2] == (2 * 130 + 2,) * 2

    def test_a_long_curve_is_thinned_and_keeps_its_mean(self, run):
        write_lines(run / "metrics.jsonl", 6000)
        points = np.array(page_of(run)[1]["curves"]["images_per_second"])
        assert len(points) == 600
        np.testing.assert_allclose(points.mean(0), [30005, 3100.5], rtol=1e-4)

    def test_a_loss_that_is_not_a_number_is_left_out(self, run):
        add_json_line(run / "metrics.jsonl", {"step": 310, "time": 1.8e9, "loss": float("nan"), "grad_norm": 1.0})
        curves = page_of(run)[1]["curves"]
        assert curves["loss"][-1][0] == 300
        assert curves["grad_norm"] == [[310, 1.0]]

    def test_an_evaluation_comes_before_the_first_loss(self, run):
        write_text(run / "metrics.jsonl", json.dumps({"step": 50, "time": 1.8e9, "bits_per_dim": 4.0}) + "\n")
        assert "Last update" in report.write(run).read_text()

    def test_evaluations_stand_side_by_side(self, run):
        for value in (3.25, 2.5):
            result = {"FID": value, "FID, 95 % interval": [2.0, 4.0], "note": "<few>"}
            results.record(run, result, {"eta": 0.5, "step": 7})
        text, _ = page_of(run)
        assert "<td>2.5 (2 to 4)</td><td>3.25 (2 to 4)</td>" in text
        assert text.count("&lt;few&gt;") == 1
        assert '<th scope="row">eta</th>' not in text

    def test_history_shows_what_was_cut_off(self, run):
        workdir.note(run, "started", 200, reached=260, devices="8 x TPU v5e", num_parameters=1)
        workdir.note(run, "stopped", 250)
        workdir.note(run, "started", 250, reached=250, devices="8 x TPU v5e", num_parameters=1)
        workdir.note(run, "failed", 250, why="no space left")
        (run / "corrupt" / "240").mkdir(parents=True)
        text, _ = page_of(run)
        items = [re.sub(r"^[\d-]+ [\d:]+ UTC: ", "", item) for item in re.findall(r"<li>(.*?)</li>", text)]
        assert items == [
            "started on 1 x cpu",
            "interrupted after step 260, for an unknown reason",
            "resumed from the checkpoint of step 200 on 8 x TPU v5e",
            "stopped at step 250 of 1,000, saved",
            "resumed from the checkpoint of step 250 on 8 x TPU v5e",
            "failed: no space left; the checkpoint of step 250 is kept",
            "unreadable checkpoints, moved to corrupt/: step 240",
        ]
        assert "failed: step 300 of 1,000" in text

    def test_of_a_run_without_captions(self, run):
        text, _ = page_of(run)
        assert "Captions" not in text
        assert "Text encoder" not in text
        assert "held out" not in text

    def test_captions_stand_under_their_grids(self, run):
        captions = ["two", "<b>five</b> & six", "seven", "ten", "six"]
        change(run / "dataset.json", shown_captions=captions, held_out=[3, 8])
        change(run / "config.json", text={"encoder": "trained", "width": 48, "num_layers": 3})
        text, _ = page_of(run)
        found = {
            section: re.findall(r"<summary>(Captions[^<]*)</summary>(<ol.*?</ol>)", part)
            for section, part in re.findall(r'<section id="(\w+)">(.*?)</section>', text, re.DOTALL)
        }
        listed = [f"<li>{html.escape(caption)}</li>" for caption in captions]
        assert listed[1] == "<li>&lt;b&gt;five&lt;/b&gt; &amp; six</li>"
        of_five, of_strip = (f'<ol class="texts">{"".join(part)}</ol>' for part in (listed, listed[:ROWS]))
        assert {section: lists for section, lists in found.items() if lists} == {
            "data": [("Captions, row by row", of_five)],
            "samples": [("Captions, row by row; after 5 they start again", of_five)],
            "denoising": [("Captions, row by row", of_strip)],
        }
        assert "<dt>Text encoder</dt><dd>trained, width 48, 3 layers</dd>" in text
        assert "5 images of 8x8x1, 2 numbers held out" in text

    @pytest.mark.parametrize(
        ("fields", "network", "pictures"),
        [
            (
                {
                    "train": {"objective": "autoencoder"},
                    "autoencoder": {"level_channels": [16, 32], "num_res_blocks": 1},
                },
                "Autoencoder of 1,234,567 parameters, 16, 32 channels by level, 1 block each, 4 channels of latents",
                "each followed by its reconstruction",
            ),
            (
                {
                    "train": {"objective": "clip"},
                    "clip": {"width": 24, "num_layers": 3, "patch_size": 2, "projection": 8},
                },
                "image encoder of width 24 and 3 layers on patches of 2x2, embeddings of width 8",
                "the captions that the CLIP picks",
            ),
            (
                {"prior": {"clip": "x", "width": 20, "num_layers": 5}},
                "Transformer of 1,234,567 parameters, width 20, 5 layers",
                "whose embeddings are nearest",
            ),
        ],
    )
    def test_says_what_other_objectives_train_and_draw(self, run, fields, network, pictures):
        change(run / "config.json", **fields)
        text, _ = page_of(run)
        assert network in text
        assert pictures in text
        assert "UNet of" not in text
        assert ("<dt>Diffusion</dt>" in text) == ("prior" in fields)

    def test_says_which_adapters_are_trained(self, run):
        change(run / "config.json", lora={"rank": 16})
        assert "LoRA of rank 16, 1,234,567 parameters, for a UNet of 128, 256, 256, 256 channels" in page_of(run)[0]

    def test_names_a_frozen_encoder(self, run):
        change(run / "config.json", text={"encoder": "/clip & more"})
        assert "<dt>Text encoder</dt><dd>frozen, /clip &amp; more</dd>" in page_of(run)[0]

    @pytest.mark.parametrize(
        "chunks",
        [
            {},
            {"parameters": "Steps: 20, Seed: 4"},
            {"settings": "no JSON"},
            {"settings": "[1]"},
            {"settings": '{"guidance_scale": "much"}'},
            {"settings": '{"guidance_scale": null}'},
        ],
    )
    def test_a_picture_of_another_program_stays_as_it_is(self, run, chunks):
        images.save(run / "samples" / "other.png", images.grid(shade(9)[None]), chunks)
        assert "<figcaption>other.png</figcaption>" in page_of(run)[0]

    @pytest.mark.slow
    def test_pictures_show_their_prompts(self, run):
        model = make_run(devices=1, captions=["one"])
        prompts = ["seven", "<b>two</b> & three"]
        pictures = {
            "step_1": {"prompts": prompts, "negative_prompts": ["ten"], "guidance_scale": 2.5},
            "vary_1": {"prompts": prompts[:1]},
            "many_1": {"prompts": [f"number {i}" for i in range(65)]},
        }
        for name, options in pictures.items():
            job = Job(model, run, seed=3, options=options)
            images.save(run / "samples" / f"{name}.png", images.grid(shade(9)[None]), job.text())
        text, _ = page_of(run)
        found = {name: re.search(rf"<figcaption>{name}\.png(.*?)</figcaption>", text)[1] for name in pictures}
        assert found["step_1"] == (
            "<br>seed 3, guidance 2.5<br>negative prompt: ten<details open><summary>Prompts, one per row</summary>"
            '<ol class="texts"><li>seven</li><li>&lt;b&gt;two&lt;/b&gt; &amp; three</li></ol></details>'
        )
        assert found["vary_1"] == "<br>seed 3<br>prompt: seven"
        assert found["many_1"].startswith("<br>seed 3<details><summary>Prompts</summary>")
        assert found["many_1"].count("<li>") == 65

    def test_of_a_run_that_has_only_begun(self, tmp_path):
        folder = workdir.check_writable(tmp_path / "run")
        write_text(folder / workdir.CONFIG, json.dumps(default_config().to_dict()))
        text, data = page_of(folder)
        assert data == {"curves": {}, "samples": [], "denoising": []}
        assert "step 0 of 800,000" in text

    def test_of_no_run(self, tmp_path):
        with pytest.raises(UserError, match="holds no run"):
            report.write(tmp_path)
        assert not list(tmp_path.iterdir())


def decoded(source):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


@pytest.mark.slow
class TestInABrowser:
    @pytest.fixture
    def opened(self, run, page):
        page.goto(report.write(run).as_uri())
        return page

    def test_the_slider_moves_through_the_pictures(self, opened):
        slider, picture = opened.get_by_label("Show").first, opened.locator("#samples-picture")
        assert picture.get_attribute("alt") == "A grid of samples at step 300"
        newest = picture.get_attribute("src")
        slider.focus()
        opened.keyboard.press("ArrowLeft")
        assert picture.get_attribute("alt") == "A grid of samples at step 200"
        assert picture.get_attribute("src") != newest
        opened.keyboard.press("Home")
        assert opened.locator("output").first.text_content() == "step 100"
        assert slider.get_attribute("aria-valuetext") == "step 100"

    def test_curves_follow_their_controls(self, opened):
        chart = opened.locator("#chart-loss")
        line = chart.locator("polyline")
        logarithmic = line.get_attribute("points")
        opened.get_by_label("logarithmic").uncheck()
        linear = line.get_attribute("points")
        assert linear != logarithmic
        opened.get_by_label("smoothing").fill("0")
        assert line.get_attribute("points") != linear
        assert chart.get_attribute("aria-label") == "loss from 1 at step 10 to 0.0333 at step 300"
        opened.get_by_role("combobox").select_option("images_per_second")
        assert "from 101 at step 10 to 130" in opened.locator("#chart-other").get_attribute("aria-label")

    def test_on_a_phone_nothing_sticks_out(self, run, chromium):
        context = chromium.new_context(viewport={"width": 360, "height": 700})
        page = context.new_page()
        page.goto(report.write(run).as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        context.close()

    def test_without_a_script_the_last_pictures_stay(self, run, chromium):
        context = chromium.new_context(java_script_enabled=False)
        page = context.new_page()
        page.goto(report.write(run).as_uri())
        assert page.locator("#samples-picture").get_attribute("alt") == "A grid of samples at step 300"
        assert "metrics.jsonl has the numbers" in page.locator("noscript").inner_text()
        context.close()
