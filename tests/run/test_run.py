"""What one does with a run, on a tiny network of random weights: shapes, seeds, batches, devices, refusals, files."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import CAPTIONS, PICTURES, QUICK, RNG, make_run, near

from ddpm_jax.data.sources import open_source
from ddpm_jax.diffusion import samplers
from ddpm_jax.runtime import parallel
from ddpm_jax.runtime.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run():
    return make_run()


@pytest.fixture(scope="module")
def classes():
    return make_run(class_conditional=True, label_dropout=0.1)


@pytest.fixture(scope="module")
def captioned():
    return make_run(captions=CAPTIONS)


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

    def test_of_the_largest_seed(self, run):
        assert not near(run.sample(2, seed=2**32 - 1, **QUICK), run.sample(2, seed=2**31, **QUICK))

    def test_progress_counts_the_calls_of_all_batches(self, run):
        told = []
        run.sample(40, sampler="heun", num_steps=5, progress=lambda *position: told.append(position))
        assert told == [(done, 27) for done in (9, 18, 27)]  # three batches of nine calls

    @pytest.mark.parametrize("devices", [1, 8])
    def test_are_made_by_one_program(self, devices, caplog):
        """Whatever the number of steps and of portions; with keys of one's own too."""
        run = make_run(devices)

        def programs():
            return sum(record.getMessage().startswith("Compiling jit(_scan)") for record in caplog.records)

        with jax.log_compiles():
            for num_steps in (5, 25, 40):
                run.sample(8, num_steps=num_steps, progress=lambda done, calls: None)
            assert programs() == 1
            for num_steps in (5, 25):
                samplers.sample(run.schedule, run.model_fn, jax.random.key(0), (16, *run.shape), num_steps=num_steps)
            assert programs() == 2

    def test_of_classes_go_round(self, classes):
        said = classes.request(labels=[2, 0]).condition
        np.testing.assert_array_equal(classes.condition.of_images(np.arange(8))["label"], [0, 1, 2, 0, 1, 2, 0, 1])
        np.testing.assert_array_equal(said.of_images(np.array([5, 6]))["label"], [0, 2])
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


@pytest.mark.eight
def test_settings_do_not_depend_on_how_the_weights_lie():
    run = make_run()
    mesh = parallel.make_mesh(data=1, fsdp=8)
    params = jax.tree.map(lambda p: np.tile(p, (64, *(1,) * (p.ndim - 1))) if p.ndim else p, run.params)
    places = parallel.state_shardings(mesh, params)
    assert any(not place.is_fully_replicated for place in jax.tree.leaves(places))
    sharded, whole = (
        dataclasses.replace(run, params=jax.device_put(params, place)).settings(seed=0)
        for place in (places, parallel.replicated(mesh))
    )
    assert sharded == whole


def test_options_of_the_steps_go_with_their_spacing_and_sampler():
    run = make_run(sampler="dpmpp_2m", spacing="leading", spacing_offset=1, skip_lowest=True, stop_at_first=True)
    own = {"spacing_offset": 1, "skip_lowest": True, "stop_at_first": True}
    for chosen, kept in (
        ({}, {"spacing_offset", "skip_lowest", "stop_at_first"}),
        ({"spacing": "linspace"}, {"stop_at_first"}),
        ({"sampler": "ddim"}, {"spacing_offset", "stop_at_first"}),
    ):
        settings = run.settings(seed=0, **chosen)
        assert {name: settings[name] for name in own if name in settings} == {name: own[name] for name in kept}
    assert run.calls(num_steps=3) == 3
    between = make_run(spacing="linspace", levels="karras", fractional=True, scaled_start=True)
    own = {"levels": "karras", "fractional": True, "scaled_start": True}
    for chosen, kept in (({}, set(own)), ({"spacing": "leading"}, set()), ({"timesteps": (5, 3)}, {"scaled_start"})):
        settings = between.settings(seed=0, **chosen)
        assert {name: settings[name] for name in own if name in settings} == {name: own[name] for name in kept}
    noise = run.encode(PICTURES, num_steps=5)
    assert near(run.decode(noise, num_steps=5), run.decode(noise, num_steps=5, spacing="leading"))


def test_a_run_is_a_line(run):
    assert re.fullmatch(r"Run\(8x8x1 images, [\d,]+ parameters, step 3, EMA 0.99, predicts eps\)", repr(run))


class TestPictures:
    def test_files_are_fitted(self, run, tmp_path):
        Image.fromarray(np.full((20, 30, 3), (255, 0, 0), np.uint8)).save(tmp_path / "red.png")
        (picture,) = run.pictures(tmp_path / "red.png")
        assert picture.shape == (8, 8, 1)
        assert np.unique(picture).tolist() == [76]  # as grey
        assert run.pictures().shape == (0, 8, 8, 1)

    def test_training_images_by_number(self, tmp_path):
        np.save(tmp_path / "some.npy", RNG.integers(0, 256, (5, 8, 8), np.uint8))
        run = make_run()
        run.config.data.update(source="array", path=str(tmp_path / "some.npy"))
        source = open_source("array", path=run.config.data.path, height=8, width=8, channels=1)
        run = dataclasses.replace(run, dataset={**run.dataset, **source.describe()})
        np.testing.assert_array_equal(
            run.pictures("data:4", "data:0"), np.load(tmp_path / "some.npy")[[4, 0], ..., None]
        )
        for name in ("data:5", "data:-1", "data:x", "data:"):
            with pytest.raises(UserError, match=f"'{name}' is not a training image; the data set has data:0 to data:4"):
                run.pictures(name)

    def test_a_file_that_is_not_there(self, run):
        with pytest.raises(UserError) as caught:
            run.pictures("none.png")
        assert str(caught.value) == "'none.png' cannot be read as a picture: No such file or directory"


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
            (lambda run: run.sample(num_image=4), "no option 'num_image'. Did you mean 'num_images'"),
            (lambda run: run.vary(PICTURES, 4, smapler="ddim"), "no option 'smapler'. Did you mean 'sampler'"),
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
            (lambda run: run.sample(1, dynamic_threshold=2.0), "dynamic_threshold is 2.0; accepted: above 0"),
        ],
    )
    def test_refused(self, run, call, said):
        with pytest.raises(UserError, match=said):
            call(run)

    def test_the_config_s_steps_fit_any_start(self):
        run = make_run(num_steps=20)
        assert run.vary(PICTURES, 5).shape == PICTURES.shape
        assert run.interpolate(PICTURES[0], PICTURES[1], [0.0, 1.0], t=3).shape == (2, 8, 8, 1)

    def test_noises_of_pictures_and_back(self, run):
        said = []
        noise = run.encode(PICTURES, num_steps=40, progress=lambda done, of: said.append((done, of)))
        assert (noise.dtype, noise.shape) == (np.float32, PICTURES.shape)
        assert said[-1][0] == said[-1][1]
        errors = [np.abs(run.decode(noise, num_steps=40).astype(int) - PICTURES).mean()]
        errors.append(
            np.abs(run.decode(run.encode(PICTURES, num_steps=10), num_steps=10).astype(int) - PICTURES).mean()
        )
        assert errors[0] < 0.6  # 0.41 grey levels measured, 1.24 in 10 steps
        assert errors[1] > 2 * errors[0]
        between = run.interpolate_latents(PICTURES[0], PICTURES[1], [0, 1], num_steps=40)
        assert near(between, run.decode(noise[:2], num_steps=40))

    def test_latents_are_deterministic_whatever_the_config(self):
        plain, noisy = make_run(), make_run(sampler="ddim", eta=0.7)
        a, b = (run.interpolate_latents(PICTURES[0], PICTURES[1], [0.0, 0.4], num_steps=8) for run in (plain, noisy))
        np.testing.assert_array_equal(a, b)

    def test_classes_in_edits(self, classes):
        for edit in (lambda **o: classes.vary(PICTURES, 30, **o), lambda **o: classes.coarse_to_fine(3, 20, **o)):
            first = edit(labels=[0], num_steps=4)
            assert not near(edit(labels=[1], num_steps=4), first)
            assert not near(edit(labels=[0], guidance_scale=4.0, num_steps=4), first)
        with pytest.raises(UserError, match="guidance needs classes"):
            classes.vary(PICTURES, 5, guidance_scale=2.0)
        alone = make_run(class_conditional=True)
        with pytest.raises(UserError, match="cannot draw images without a class"):
            alone.vary(PICTURES, 5)
        assert alone.vary(PICTURES, 5, labels=np.array([1, 2])).shape == PICTURES.shape

    def test_class_that_does_not_exist(self, classes):
        with pytest.raises(UserError, match="class 3 does not exist; this run has classes 0 to 2"):
            classes.sample(1, labels=[0, 3])


class TestPrompts:
    @pytest.fixture
    def run(self, captioned):
        return captioned

    def test_go_round(self, run):
        """Without any, captions of the data set."""
        mixed = run.sample(6, prompts=["a plum", "two plums"], **QUICK)
        for row, prompt in enumerate(("a plum", "two plums")):
            assert near(run.sample(6, prompts=[prompt], **QUICK)[row::2], mixed[row::2])
        assert not near(mixed[::2], run.sample(6, prompts=["two plums"], **QUICK)[::2])
        assert near(run.sample(6, **QUICK), run.sample(6, prompts=CAPTIONS, **QUICK))

    def test_negative_prompts_take_the_empty_one_s_place(self, run):
        options = {"prompts": ["a plum"], "guidance_scale": 3.0, **QUICK}
        plain = run.sample(4, **options)
        assert near(run.sample(4, negative_prompts=[""], **options), plain)
        away = run.sample(4, negative_prompts=["", "a red apple"], **options)
        assert near(away[::2], plain[::2])
        assert not near(away[1::2], plain[1::2])
        # Away from itself is nowhere.
        assert near(run.sample(4, negative_prompts=["a plum"], **options), run.sample(4, prompts=["a plum"], **QUICK))

    def test_another_prompt_and_scale_compile_nothing(self, run, caplog):
        """Whatever their number; prompts that come in turn, negative ones, and another length are the same program."""
        run.sample(8, prompts=["a plum"], guidance_scale=2.0, **QUICK)
        with jax.log_compiles(True):
            run.sample(8, prompts=["two plums", "a red apple"], guidance_scale=5.0, seed=1, **QUICK)
            run.sample(8, prompts=["plums " * 100], negative_prompts=[""], guidance_scale=0.5, num_steps=7)
            run.sample(8, guidance_rescale=0.5, guidance_scale=2.0, guidance_interval=(3, 20), **QUICK)
        assert not [message for message in caplog.messages if message.startswith("Compiling")]

    def test_of_null_are_made_by_one_program(self, run):
        """As the bound and the flow call the network: for any number of images, and fetched any number of times."""
        x, t = RNG.standard_normal((16, 8, 8, 1)).astype(np.float32), np.arange(16)
        call = jax.jit(lambda model_fn, x, t: model_fn(x, t))
        found = [call(run.model_fn, x, t) for _ in range(2)]
        assert call._cache_size() == 1
        expected = call(run.model.model_fn(run.params, run.condition.null(16)), x, t)
        np.testing.assert_allclose(found, [expected] * 2, atol=1e-5)

    @pytest.mark.parametrize(
        "prompt",
        [
            "",
            "word " * 1000,
            "\U0001f34e\U0001f468\u200d\U0001f469\u200d\U0001f467",
            "\u062a\u0641\u0627\u062d\u0629 \u062d\u0645\u0631\u0627\u0621",
            "<end><pad>",
        ],
    )
    def test_any_text_is_a_prompt(self, run, prompt):
        found = run.sample(8, prompts=[prompt], guidance_scale=2.0, **QUICK)
        assert len({image.tobytes() for image in found}) == 8
        assert near(found[:2], run.sample(2, prompts=[prompt], guidance_scale=2.0, **QUICK))

    @pytest.mark.parametrize(
        ("call", "said"),
        [
            (lambda run: run.sample(1, prompts=["a\0b"]), "contains a NUL character"),
            (lambda run: run.sample(1, prompts="a plum"), "prompts is the text 'a plum'; accepted: a list of texts"),
            (lambda run: run.sample(1, prompts=["caf\udce9"]), "is not Unicode text"),
            (lambda run: run.sample(1, negative_prompts=["x"]), "does nothing at a guidance_scale of 1"),
            (lambda run: run.sample(1, labels=[0]), "not class-conditional"),
            (lambda run: run.vary(PICTURES, 5, guidance_scale=2.0), "guidance needs a prompt to steer towards"),
            (lambda run: run.between(prompts=["x"]), "1 prompts or classes are given; accepted: two"),
            (lambda run: run.between(prompts=["x", "y"], weights=[]), "1 images at 0 weights are asked for"),
            (lambda run: run.between(0, prompts=["x", "y"]), "0 images at 11 weights are asked for"),
        ],
    )
    def test_refused(self, run, call, said):
        with pytest.raises(UserError, match=said):
            call(run)

    def test_settings_of_many_are_short(self, run):
        many = [f"red {i}" for i in range(10_000)]
        assert run.request(prompts=many).condition.prompts == tuple(many)
        settings = run.settings(seed=0, prompts=many, negative_prompts=many, guidance_scale=2.0)
        assert len(json.dumps(settings)) < 1500
        assert settings["prompts"]["count"] == settings["negative_prompts"]["count"] == 10_000

    def test_between_two_from_the_same_noise(self, run):
        """Both ends are the images of each prompt alone."""
        ends = ("a plum", "two green pears")
        options = {"seed": 4, "guidance_scale": 2.0, "negative_prompts": ["an apple"], **QUICK}
        way = run.between(3, weights=[0.0, 0.5, 1.0], prompts=ends, **options)
        assert way.shape == (3, 3, 8, 8, 1)
        for column, prompt in ((0, ends[0]), (2, ends[1])):
            assert near(way[:, column], run.sample(3, prompts=[prompt], **options))
        assert not near(way[:, 0], way[:, 2])


def test_between_two_classes(classes):
    way = classes.between(2, weights=[0.0, 1.0], labels=[2, 0], **QUICK)
    assert near(way[:, 0], classes.sample(2, labels=[2], **QUICK))
    assert near(way[:, 1], classes.sample(2, labels=[0], **QUICK))
