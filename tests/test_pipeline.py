"""Pipelines of tiny runs: a cascade, and DALL-E 2's prior, decoder and super-resolution."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from clips import make_clip
from flax.traverse_util import flatten_dict

import ddpm_jax
from ddpm_jax import config as config_lib
from ddpm_jax import pipeline, report
from ddpm_jax.commands import evaluation
from ddpm_jax.commands.job import Job
from ddpm_jax.interop import transformers
from ddpm_jax.models.captioned import Captioned
from ddpm_jax.models.embedding_condition import Embedded
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.sampling.generate import generate
from ddpm_jax.sampling.given import Inputs
from ddpm_jax.serve.actions import Playground

CAPTIONS = ("a red apple", "two green pears", "a plum")


def tiny(folder, height=8, width=8, **sections):
    """A config of a few steps on 24 captioned grey pictures."""
    path = folder / "pictures.npz"
    if not path.exists():
        pictures = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), np.uint8)
        np.savez(path, image=pictures, caption=CAPTIONS * 8)
    config = config_lib.default_config()
    config.data.update(source="array", path=str(path), height=height, width=width, channels=1, flip=True)
    config.model.update(
        channels=8, num_groups=4, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,)
    )
    config.diffusion.num_timesteps = 20
    config.train.update(batch_size=8, num_steps=2, ema_decays=(0.0,))
    config.log.update(every_steps=2, sample_every_steps=0)
    config.sample.update(num_images=4, batch_size=8, sampler="ddim", num_steps=2)
    for section, fields in sections.items():
        config[section].update(fields)
    return config


def trained(folder, name, config):
    """The workdir of a run, whose last layer is not zero any more."""
    config.optimizer.update(learning_rate=0.05, warmup_steps=0)
    ddpm_jax.train(config, folder / name)
    return folder / name


def make_cascade(folder):
    """Workdirs "base" (4x4, of captions), "sr" (to 8x8, of captions) and "cascade"."""
    text = {"encoder": "trained", "vocab_size": 280, "max_length": 8, "width": 16, "num_layers": 1}
    trained(folder, "base", tiny(folder, 4, 4, text=text))
    trained(folder, "sr", tiny(folder, text=text, upscale={"height": 4, "width": 4}))
    pipeline.compose([folder / "base", folder / "sr"], folder / "cascade")


def make_unclip(folder):
    """Workdirs "prior", "decoder" and "both", of a random CLIP."""
    transformers.write_clip(folder / "clip", make_clip(folder / "tokenizer"))
    text = {"encoder": str(folder / "clip"), "max_length": 24}
    clip = str(folder / "clip")
    prior = tiny(folder, text=text, prior={"clip": clip, "width": 16, "num_layers": 1, "num_heads": 2})
    prior.data.flip = False
    prior.diffusion.update(clip=False, prediction="x_0", schedule="cosine")
    trained(folder, "prior", prior)
    trained(folder, "decoder", tiny(folder, text=text, embedding={"clip": clip, "token_width": 8}))
    shutil.rmtree(folder / "clip")  # each run has its own
    pipeline.compose([folder / "prior", folder / "decoder"], folder / "both")


@pytest.fixture(scope="module")
def cascade(made_once):
    return made_once(make_cascade)


@pytest.fixture(scope="module")
def unclip(made_once):
    return made_once(make_unclip)


@pytest.mark.slow
class TestCascade:
    def test_an_image_follows_from_its_number_and_the_settings(self, cascade):
        run = ddpm_jax.load(cascade / "cascade")
        assert run.shape == (8, 8, 1)
        said = {"prompts": ["a plum"], "guidance_scale": [2.0, 1.0]}
        images = run.sample(5, seed=3, batch_size=8, **said)
        again = run.sample(seed=3, indices=[4, 1], batch_size=16, **said)
        assert np.max(np.abs(images[[4, 1]].astype(int) - again)) <= 1
        assert len(np.unique(images, axis=0)) == 5

    def test_the_second_stage_enlarges_what_the_first_draws(self, cascade):
        """The base's own pictures, enlarged by the second run with that stage's noise, are the pipeline's."""
        run, base = (ddpm_jax.load(cascade / name) for name in ("cascade", "base"))
        small = base.sample(4, seed=1, prompts=["a plum"])
        enlarged = generate(
            run.stages[1].model,
            run.params,
            run.mesh,
            run.stages[1].request(prompts=["a plum"]),
            indices=range(4),
            seed=1,
            batch_size=8,
            given=Inputs(small),
            purpose="image of stage 2",
        )[0]
        np.testing.assert_array_equal(run.sample(4, seed=1, prompts=["a plum"]), enlarged)
        black = np.zeros_like(small)
        assert not np.array_equal(run.stages[1].upscale(black, seed=1), run.stages[1].upscale(small, seed=1))
        settings = run.settings(seed=1, prompts=["a plum"])
        assert [settings["step"], settings["stages"][0]["augmentation"]] == [2, 0.1]
        assert run.calls() == 4

    def test_an_option_for_each_stage(self, cascade):
        run = ddpm_jax.load(cascade / "cascade")
        request = run.request(prompts=["a plum"], guidance_scale=[3.0, 1.5], num_steps=5)
        assert [request.guidance.scale, request.then[0].guidance.scale] == [3.0, 1.5]
        assert [request.steps.num_steps, request.then[0].steps.num_steps] == [5, 5]
        with pytest.raises(UserError, match="guidance_scale has 3 values; accepted: one, or one for each of 2 stages"):
            run.request(guidance_scale=[1.0, 2.0, 3.0])

    def test_the_network_sees_picture_level_and_text(self, cascade):
        """All three reach it: with another of any the output changes."""
        run = ddpm_jax.load(cascade / "sr")
        assert isinstance(run.net, Captioned)
        rng = np.random.default_rng(1)
        x, t, cond = run.model.example(1)
        cond = {**cond, "image": rng.normal(size=cond["image"].shape), "ids_mask": np.ones_like(cond["ids_mask"])}
        plain = run.net.apply({"params": run.params}, x, t, cond)
        for name, value in (("image", -cond["image"]), ("level", cond["level"] + 9), ("ids", cond["ids"] + 7)):
            other = run.net.apply({"params": run.params}, x, t, {**cond, name: value})
            assert np.max(np.abs(other - plain)) > 1e-3, name

    def test_edits_are_refused(self, cascade):
        for name in ("sr", "cascade"):
            run = ddpm_jax.load(cascade / name)
            with pytest.raises(UserError, match="this run works on the result of another stage"):
                run.vary(np.zeros((1, 8, 8, 1), np.uint8), t=5)
            playground = Playground(run, name, 2)
            assert playground.facts()["edits"] == []
            with pytest.raises(UserError, match="this run works on the result of another stage"):
                playground.vary({})  # before it is queued
        with pytest.raises(UserError, match="the pictures to enlarge are uint8 of shape"):
            ddpm_jax.load(cascade / "sr").upscale(np.zeros((1, 8, 8, 1), np.uint8))
        with pytest.raises(UserError, match="this run does not enlarge pictures"):
            ddpm_jax.load(cascade / "base").upscale(np.zeros((1, 4, 4, 1), np.uint8))

    def test_what_does_not_go_together(self, cascade, tmp_path):
        base, sr = cascade / "base", cascade / "sr"
        for stages, sentence in (
            ([sr, base], "stage 2, .*base', takes no input from another stage"),
            ([base, sr, sr], "stage 2, .*sr', makes 8x8x1, but stage 3, .*sr', takes 4x4x1; accepted: the same"),
            ([base], "--stages has 1 run; accepted: two or more"),
            ([base, tmp_path / "none"], "holds no run"),
        ):
            with pytest.raises(UserError, match=sentence):
                pipeline.compose(stages, tmp_path / "new")
            assert not (tmp_path / "new").exists()
        with pytest.raises(UserError, match="which is the --workdir of the pipeline itself"):
            pipeline.compose([cascade / "cascade", sr], cascade / "cascade")
        with pytest.raises(UserError, match="is a pipeline; its stages are trained in separate workdirs"):
            ddpm_jax.train(tiny(cascade), cascade / "cascade")

    def test_a_stage_that_is_missing_or_was_trained_on(self, cascade, tmp_path):
        shutil.copytree(cascade, tmp_path / "copy")
        run = tmp_path / "copy" / "cascade"
        assert ddpm_jax.load(run).shape == (8, 8, 1)  # stages are found beside it wherever both lie
        (tmp_path / "copy" / "base" / "checkpoints" / "2").rename(tmp_path / "copy" / "base" / "checkpoints" / "4")
        with pytest.raises(
            UserError, match=r"stage 1 of .* was at step 2 and is at step 4 now; compose the pipeline again"
        ):
            ddpm_jax.load(run)
        shutil.rmtree(tmp_path / "copy" / "base")
        with pytest.raises(UserError, match=r"stage 1 of .* is not there any more"):
            ddpm_jax.load(run)


@pytest.mark.slow
class TestUnclip:
    def test_a_prior_draws_embeddings(self, unclip):
        run = ddpm_jax.load(unclip / "prior")
        embeddings = run.sample(3, prompts=["a plum"])
        assert embeddings.shape == (3, 1, 1, 8)
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=-1), 1.0, rtol=1e-5)
        more = dict(json.loads((unclip / "prior" / "config.json").read_text()))["prior"]["candidates"]
        assert more == 2

    def test_the_better_of_two_is_kept(self, unclip):
        """More candidates are never worse, since the first ones are the same; a run draws as many as requested."""
        run = ddpm_jax.load(unclip / "prior")
        request = run.request(prompts=["a plum"])
        assert (request.candidates, run.calls(), run.settings(seed=0)["candidates"]) == (2, 4, 2)
        vector = request.condition.of_images(np.arange(8))["vector"]

        def scores(candidates):
            asked = dataclasses.replace(request, candidates=candidates)
            drawn = generate(run.model, run.params, run.mesh, asked, indices=range(8), seed=0, batch_size=8)[0]
            return np.sum(drawn[:, 0, 0] * vector, axis=1)

        two, three, four = map(scores, (2, 3, 4))
        sampled = run.sample(8, prompts=["a plum"], batch_size=8)
        np.testing.assert_allclose(np.sum(sampled[:, 0, 0] * vector, axis=1), two, rtol=1e-6)
        assert np.any(scores(1) < two)
        assert np.all(two <= three)
        assert np.all(three <= four)
        assert np.any(two < four)

    def test_prompt_to_picture(self, unclip):
        run = ddpm_jax.load(unclip / "both")
        images = run.sample(3, prompts=["a plum"], guidance_scale=2.0)
        assert images.shape == (3, 8, 8, 1)
        assert images.dtype == np.uint8

    def test_pictures_through_their_embeddings(self, unclip):
        for name in ("decoder", "both"):
            run = ddpm_jax.load(unclip / name)
            assert isinstance(run.stages[-1].net if name == "both" else run.net, Embedded)
            pictures = (
                run.stages[-1].pictures("data:0", "data:5") if name == "both" else run.pictures("data:0", "data:5")
            )
            assert run.variations(pictures, seed=1).shape == (2, 8, 8, 1)
            blended = run.blend(*pictures, weights=(0.0, 0.5, 1.0), seed=2)
            ends = run.of_embeddings(run.embedder.of_pictures(pictures), seed=2, same_noise=True)
            assert np.max(np.abs(blended[[0, -1]].astype(int) - ends)) <= 1
            moved = run.text_difference(pictures[0], "a plum", "a red apple", weights=(0.0, 0.4))
            assert not np.array_equal(*moved)
            with pytest.raises(UserError, match="have the same embedding"):
                run.text_difference(pictures[0], "a plum", "a plum")

    def test_a_prior_of_another_clip(self, unclip, tmp_path):
        shutil.copytree(unclip / "prior", tmp_path / "prior")
        description = json.loads((tmp_path / "prior" / "dataset.json").read_text())
        (tmp_path / "prior" / "dataset.json").write_text(json.dumps(description | {"clip_crc32": 1}))
        with pytest.raises(UserError, match=r"stage 2, .* was trained with a different CLIP than stage 1"):
            pipeline.compose([tmp_path / "prior", unclip / "decoder"], tmp_path / "both")

    def test_names_of_the_decoders_parameters(self, unclip):
        params = flatten_dict(ddpm_jax.load(unclip / "decoder").params)
        assert {path[0] for path in params} == {"net", "condition"}


@pytest.mark.slow
class TestCommands:
    def test_report_and_evaluation(self, cascade, tmp_path):
        """They work for a pipeline as for a run; the report names its stages."""
        folder = shutil.copytree(cascade, tmp_path / "copy") / "cascade"
        job = Job(ddpm_jax.load(folder), folder)
        result = evaluation.evaluate(
            job,
            features="digits",
            against="data",
            generated=None,
            num_images=8,
            likelihood="estimate",
            likelihood_images=2,
            clip_model=None,
            batch_size=8,
            shard_size=4,
            save_reference=None,
        )
        assert result["stages"][0]["step"] == 2
        assert "the output of another stage" in result["not computed"]
        page = report.write(folder).read_text()
        assert "a pipeline of 2 runs" in page
        assert "../base, step 2, makes 4x4x1" in page
