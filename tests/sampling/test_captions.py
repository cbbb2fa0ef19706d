"""Captions as a condition: what is drawn and dropped in training, what is accepted and refused in sampling."""

import json

import jax
import numpy as np
import pytest

from ddpm_jax.data import pipeline
from ddpm_jax.data.sources import open_source
from ddpm_jax.diffusion.guidance import Guidance
from ddpm_jax.models.clip import TextEncoder
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.sampling.captions import CaptionCondition
from ddpm_jax.sampling.condition import ClassCondition, NoCondition, check_guidance
from ddpm_jax.text.encoders import TrainedTexts
from ddpm_jax.text.tokenizers import Tokenizer

TOKENIZER = Tokenizer.train(["a red apple", "two green pears"], 280, 12)
TEXTS = TrainedTexts(TOKENIZER, TextEncoder(280, max_length=12, width=8))
PLAIN, DROPPED = CaptionCondition(TEXTS, 0.0, ("a", "b c")), CaptionCondition(TEXTS, 0.3, ("a", "b c"))
NUMBERS = np.arange(5, 12)


def ids(*texts):
    return TOKENIZER.encode(texts).ids


def refusal(call, *arguments, **options):
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestTraining:
    @pytest.fixture
    def source(self, tmp_path):
        """Eight images; image i has 1 + i % 3 captions."""
        captions = np.array([[f"{i} {'xyz'[k]}" if k <= i % 3 else "" for k in range(3)] for i in range(8)])
        images = np.arange(8, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 1), np.uint8)
        np.savez(tmp_path / "images.npz", image=images, caption=captions)
        return open_source("array", path=str(tmp_path / "images.npz"), height=4, width=4, channels=1, captions=True)

    def read(self, source, steps, rows=slice(None), seed=0, batch_size=8):
        batches = pipeline.host_batches(
            source, seed=3, batch_size=batch_size, first_step=steps[0], last_step=steps[1], rows=rows
        )
        for step, batch in enumerate(batches, steps[0]):
            yield PLAIN.read(batch, source, pipeline.batch_draws(seed, step, batch_size)[rows])

    def texts(self, batch):
        return [TOKENIZER.decode(row) for row in batch["ids"]]

    def test_a_caption_goes_with_its_image(self, source):
        for batch in self.read(source, (0, 3)):
            shown = batch["image"][:, 0, 0, 0].tolist()
            for image, text in zip(shown, self.texts(batch), strict=True):
                assert text in source.captions[image]

    def test_which_of_several_is_drawn_by_seed_step_and_row(self, source):
        first, again, other = (list(self.read(source, (0, 4), seed=seed)) for seed in (0, 0, 1))
        later, part = list(self.read(source, (2, 4))), list(self.read(source, (0, 4), np.array([1, 6])))
        for step in range(4):
            np.testing.assert_array_equal(first[step]["ids"], again[step]["ids"])
            np.testing.assert_array_equal(first[step]["ids"][[1, 6]], part[step]["ids"])
        for step in (0, 1):
            np.testing.assert_array_equal(first[2 + step]["ids"], later[step]["ids"])
        assert any(np.any(a["ids"] != b["ids"]) for a, b in zip(first, other, strict=True))

    def test_all_of_several_are_drawn_equally_often(self, source):
        drawn = [text for batch in self.read(source, (0, 300)) for text in self.texts(batch)]
        for captions in source.captions:
            counts = [drawn.count(text) for text in captions]
            share = 1 / len(counts)
            assert sum(counts) == 300
            assert np.all(np.abs(np.array(counts) - 300 * share) <= 4 * (300 * share * (1 - share)) ** 0.5)

    def test_without_draws_it_is_the_first(self, source):
        batch = {"index": np.array([5, 0, 7])}
        assert self.texts(PLAIN.read(batch, source)) == ["5 x", "0 x", "7 x"]

    def batch(self, count=4000):
        images = np.zeros((count, 1), np.uint8)
        return {"image": images, **TEXTS.arrays([DROPPED.shown[i % 2] for i in range(count)])}

    def test_captions_are_dropped_by_the_step_s_key_at_their_rate(self):
        batch, asked = self.batch(), []

        def key(purpose, seed=0):
            asked.append(purpose)
            return jax.random.key(seed)

        for name, values in PLAIN.of_training(batch, key).items():
            np.testing.assert_array_equal(values, batch[name])
        assert not asked
        cond, again = DROPPED.of_training(batch, key), DROPPED.of_training(batch, key)
        assert asked == ["caption_dropout"] * 2
        null = TEXTS.arrays([""])
        is_null = np.all(cond["ids"] == null["ids"], axis=1)
        assert abs(is_null.mean() - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5
        for name, values in cond.items():
            np.testing.assert_array_equal(values, np.where(is_null[:, None], null[name], batch[name]))
            np.testing.assert_array_equal(values, again[name])
        other = DROPPED.of_training(batch, lambda purpose: key(purpose, 1))
        assert np.any(other["ids"] != cond["ids"])

    def test_a_dropped_caption_is_the_null_condition(self):
        always = CaptionCondition(TEXTS, 1.0)
        cond, null = always.of_training(self.batch(5), lambda purpose: jax.random.key(0)), always.null(5)
        jax.tree.map(np.testing.assert_array_equal, dict(cond), dict(null))
        with pytest.raises(UserError, match=r"to work without a caption \(text.dropout is 0\); give a prompt"):
            PLAIN.null(2)


class TestPrompts:
    def test_go_round(self):
        """Image i has prompt i mod n and negative prompt i mod m."""
        said = DROPPED.say(prompts=["p", "q", "r"], negative_prompts=["s", "t"])
        assert (said.is_said, said.rows, DROPPED.is_said) == (True, 3, False)
        expected = ["pqr"[i % 3] for i in NUMBERS]
        np.testing.assert_array_equal(said.of_images(NUMBERS)["ids"], ids(*expected))
        assert said.record(NUMBERS)["prompt"].tolist() == expected
        np.testing.assert_array_equal(said.null(5)["ids"], ids(*"ststs"))
        np.testing.assert_array_equal(DROPPED.say(prompts=["p"]).null(2)["ids"], ids("", ""))

    def test_captions_of_the_data_set_come_in_turn_without_prompts(self):
        np.testing.assert_array_equal(DROPPED.of_images(NUMBERS)["ids"], ids(*(DROPPED.shown[i % 2] for i in NUMBERS)))
        assert DROPPED.record(np.arange(3))["prompt"].tolist() == ["a", "b c", "a"]

    def test_the_empty_prompt_is_a_prompt(self):
        said = PLAIN.say(prompts=[""])
        assert said.is_said
        np.testing.assert_array_equal(said.of_images(np.arange(2))["ids"], ids("", ""))

    @pytest.mark.parametrize("name", ["prompts", "negative_prompts"])
    @pytest.mark.parametrize(
        ("value", "said"),
        [
            ("a red apple", "is the text 'a red apple'; accepted: a list of texts"),
            (["a", 3], "[1] is 3; accepted: texts"),
            ([None], "[0] is None; accepted: texts"),
            (["a\0b"], r"[0], 'a\x00b', contains a NUL character, which texts may not contain"),
            (["caf\udce9"], r"'caf\udce9' is not Unicode text"),
        ],
    )
    def test_refused(self, name, value, said):
        assert said in refusal(DROPPED.say, **{"prompts": ["x"], name: value})

    def test_requests_of_other_kinds_are_refused(self):
        assert "not class-conditional" in refusal(DROPPED.say, labels=[1])
        for other in (NoCondition(), ClassCondition(("a", "b"), 0.1)):
            assert "takes no prompt" in refusal(other.say, prompts=["x"])
            assert "takes no negative prompt" in refusal(other.say, negative_prompts=["x"])

    def test_guidance(self):
        assert "give one" in refusal(DROPPED.require)
        DROPPED.say(prompts=["x"]).require()
        negative = DROPPED.say(prompts=["x"], negative_prompts=["y"])
        check_guidance(negative, Guidance(2.0))
        assert refusal(check_guidance, negative, Guidance()) == (
            "a negative prompt does nothing at a guidance_scale of 1; set another, such as guidance_scale=2"
        )
        assert "a text.dropout above 0" in refusal(check_guidance, PLAIN.say(prompts=["x"]), Guidance(2.0))

    def test_what_is_cut_is_reported_once(self, caplog):
        long = "a red apple and two green pears and something that is cut"
        for _ in range(3):
            DROPPED.say(prompts=["short", long])
        (said,) = [message for message in caplog.messages if long[:60] in message]
        (cut,) = TOKENIZER.encode([long]).cut
        assert cut
        assert long.endswith(cut)
        assert said == f"The prompt {long[:60]!r} is longer than 12 tokens; this end of it is cut off: {cut!r}"
        caplog.clear()
        DROPPED.say(negative_prompts=["very " * 1000])
        (said,) = caplog.messages
        assert len(said) < 400

    def test_many_that_are_cut_are_counted(self, caplog):
        for _ in range(2):
            DROPPED.say(prompts=["short", *(f"{i} pears and something that is cut" for i in range(5000))])
        assert len(caplog.messages) == 9
        assert caplog.messages[7].startswith("The prompt '7 pears")
        assert caplog.messages[8] == "4992 more of 5001 prompts are longer than 12 tokens and cut"

    def test_settings_hold_a_digest_of_many(self):
        few, many = ([f"red {i}" for i in range(count)] for count in (64, 10_000))
        assert DROPPED.say(prompts=few).settings() == {"prompts": few, "negative_prompts": []}
        settings = DROPPED.say(prompts=many, negative_prompts=many[:65]).settings()
        assert settings["prompts"]["count"] == 10_000
        assert settings["negative_prompts"]["count"] == 65
        assert len(json.dumps(settings)) < 300
        changed = [*many[:-1], "another"]
        assert DROPPED.say(prompts=changed).settings()["prompts"] != settings["prompts"]
        assert DROPPED.say(prompts=many).settings()["prompts"] == settings["prompts"]

    def test_no_two_lists_have_the_same_digest(self):
        """However their texts are cut apart."""
        joined, apart = ['x", "y'] + ["z"] * 70, ["x", "y"] + ["z"] * 70
        assert DROPPED.say(prompts=joined).settings() != DROPPED.say(prompts=apart).settings()

    def test_the_page_s_fields(self):
        assert [control.name for control in DROPPED.controls()] == ["prompt", "negative_prompt"]
        assert [control.name for control in PLAIN.controls()] == ["prompt"]
        assert tuple(DROPPED.controls()[0].suggestions) == DROPPED.shown
