import jax
import numpy as np
import pytest

from ddpm_jax.diffusion.guidance import Guidance
from ddpm_jax.models.clip import CLIPTextEncoder, TextEncoder
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.sampling.captions import CaptionCondition
from ddpm_jax.sampling.condition import KEYWORDS, ClassCondition, NoCondition, check_guidance
from ddpm_jax.text.encoders import FrozenTexts, TrainedTexts
from ddpm_jax.text.tokenizers import Tokenizer

NAMES = ("zero", "one", "two")
TOKENIZER = Tokenizer.train(NAMES, 270, 6)
TRAINED = TrainedTexts(TOKENIZER, TextEncoder(270, max_length=6, width=8))
CLIP = CLIPTextEncoder(270, max_length=6, width=8, num_layers=1, num_heads=2, mlp_width=8, projection=5)
FROZEN = FrozenTexts(TOKENIZER, CLIP, lambda: CLIP.init(jax.random.key(0), np.zeros((1, 2), np.int32))["params"])
KINDS = [
    NoCondition(),
    ClassCondition(NAMES),
    ClassCondition(NAMES, dropout=0.2),
    ClassCondition(NAMES, null_class=False),
    CaptionCondition(TRAINED),
    CaptionCondition(TRAINED, 0.2, NAMES),
    CaptionCondition(FROZEN, 0.2, NAMES),
]
NUMBERS = np.arange(5, 12)


@pytest.mark.parametrize("condition", KINDS, ids=lambda condition: type(condition).__name__)
def test_every_kind_has_the_same_shapes_wherever_it_is_asked(condition):
    """A network is initialised, trained and sampled with the same arrays, and guidance pairs them with the null's."""
    batch = {name: np.zeros((7, *x.shape), x.dtype) for name, x in condition.reads.items()}
    batch["image"] = np.zeros((7, 1), np.uint8)
    kinds = [
        condition.of_images(NUMBERS),
        condition.of_batch(batch),
        condition.of_training(batch, lambda purpose: jax.random.key(0)),
    ]
    if condition.can_be_left_out:
        kinds.append(condition.null(7))
    shapes = [jax.tree.map(lambda x: (x.shape, str(x.dtype)), cond) for cond in kinds if cond is not None]
    assert all(found == shapes[0] for found in shapes)
    assert {len(values) for values in condition.record(NUMBERS).values()} == {7}
    assert (condition.is_said, condition.rows) == (False, 0)
    assert condition.say(**dict.fromkeys(KEYWORDS, ())) == condition


def test_without_a_condition_no_request_is_accepted():
    plain = NoCondition()
    assert plain.of_images(NUMBERS) is plain.null(7) is None
    for keyword, why in KEYWORDS.items():
        with pytest.raises(UserError, match=why):
            plain.say(**{keyword: [0]})
    with pytest.raises(UserError, match="trained with a condition"):
        plain.require()


class TestClasses:
    def test_go_round(self):
        condition = ClassCondition(NAMES)
        np.testing.assert_array_equal(condition.of_images(NUMBERS)["label"], NUMBERS % 3)
        said = condition.say(labels=[2, 0])
        assert (said.is_said, said.rows, said.settings()) == (True, 2, {"labels": [2, 0]})
        np.testing.assert_array_equal(said.record(NUMBERS)["label"], [0, 2, 0, 2, 0, 2, 0])
        assert not condition.is_said

    def test_are_dropped_by_the_step_s_key_at_their_rate(self):
        batch = {"label": np.arange(4000) % 3}
        asked = []

        def key(purpose):
            asked.append(purpose)
            return jax.random.key(0)

        np.testing.assert_array_equal(ClassCondition(NAMES).of_training(batch, key)["label"], batch["label"])
        assert not asked
        labels = np.asarray(ClassCondition(NAMES, 0.2).of_training(batch, key)["label"])
        assert asked == ["label_dropout"]
        assert np.all((labels == batch["label"]) | (labels == 3))
        assert abs(np.mean(labels == 3) - 0.2) < 4 * (0.2 * 0.8 / 4000) ** 0.5

    def test_null(self):
        np.testing.assert_array_equal(ClassCondition(NAMES, 0.2).null(2)["label"], [3, 3])
        with pytest.raises(UserError, match=r"images without a class \(train.label_dropout is 0\); name the classes"):
            ClassCondition(NAMES).null(2)
        with pytest.raises(UserError, match=r"images without a class \(model.null_class is False\)"):
            ClassCondition(NAMES, null_class=False).null(2)

    def test_refused(self):
        with pytest.raises(UserError, match="class 3 does not exist; this run has classes 0 to 2"):
            ClassCondition(NAMES).say(labels=[1, 3])
        with pytest.raises(UserError, match="guidance needs classes to steer towards"):
            ClassCondition(NAMES).require()


def test_guidance_needs_a_condition_and_its_null():
    check_guidance(ClassCondition(NAMES, 0.2), Guidance(2.0))
    for condition in (NoCondition(), ClassCondition(NAMES)):
        check_guidance(condition, Guidance())
        with pytest.raises(UserError, match=r"guidance_scale is 2\.0; other than 1 it needs a run"):
            check_guidance(condition, Guidance(2.0))
    with pytest.raises(UserError, match="it needs a network with a null class, but this one has none"):
        check_guidance(ClassCondition(NAMES, null_class=False), Guidance(2.0))
    for guidance, why in (
        (Guidance(2.0, rescale=1.5), r"guidance_rescale is 1\.5; accepted: 0 to 1"),
        (Guidance(2.0, interval=(3,)), r"guidance_interval is \(3,\); accepted: the lowest"),
        (Guidance(1.0, rescale=0.5), "need a guidance_scale other than 1"),
    ):
        with pytest.raises(UserError, match=why):
            check_guidance(ClassCondition(NAMES, 0.2), guidance)
