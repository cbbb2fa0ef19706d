"""The playground's actions on a tiny run: the same pictures as the run's methods give, and refusals."""

import base64
import io
import socket
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from runs import PATIENCE
from tiny import PICTURES, make_run, near

from ddpm_jax.runtime.errors import UserError
from ddpm_jax.serve.actions import Playground
from ddpm_jax.serve.app import make_app
from ddpm_jax.serve.queue import CancelledError, Queue
from ddpm_jax.serve.server import Server

pytestmark = pytest.mark.slow
QUICK = {"num_steps": "4", "sampler": "ddim"}
WATCHED = {"watch": lambda *told: None}  # so that the run's own methods use the programs that are compiled already


def upload(picture):
    file = io.BytesIO()
    Image.fromarray(picture.squeeze(-1) if picture.ndim == 3 else picture).save(file, "PNG")
    file.seek(0)
    return SimpleNamespace(file=file)


def decoded(urls):
    found = [np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))) for url in urls]
    return np.stack(found).reshape(len(found), *PICTURES.shape[1:])


class Told:
    """A stand-in for the queue's task that records what the work reports."""

    def __init__(self, action, cancelled=False):
        self.frames, self.positions, self.cancelled = [], [], cancelled
        self.pictures = decoded(action.task(lambda: None).work(self)["pictures"])

    def progress(self, done, calls):
        self.positions.append((done, calls))
        if self.cancelled:
            raise CancelledError

    def tell(self, state, pictures, **position):
        self.frames.append(decoded(pictures))


@pytest.fixture(scope="module")
def playground():
    return Playground(make_run(devices=1), "tiny", 8)


@pytest.fixture(scope="module")
def classes():
    return Playground(make_run(devices=1, class_conditional=True, label_dropout=0.1), "tiny", 8)


CAPTIONS = ("one", "two", "<b>three</b> & more", "two")


@pytest.fixture(scope="module")
def captioned():
    return Playground(make_run(devices=1, captions=CAPTIONS), "tiny", 8)


class TestActions:
    def test_sampling_shows_the_way(self, playground):
        told = Told(playground.sample({"seed": "5", "num_images": "3", "num_steps": "9", "sampler": "ddpm"}))
        expected = playground.run.sample(8, 5, num_steps=9, sampler="ddpm", **WATCHED)
        assert near(told.pictures, expected[:3])
        assert told.positions == [(2, 9), (4, 9), (6, 9), (8, 9), (9, 9)]
        assert len(told.frames) == 5
        assert near(told.frames[-1], told.pictures)
        assert not near(told.frames[0], told.pictures)

    def test_a_long_way_is_shown_in_few_pictures(self, playground):
        told = Told(playground.sample({"num_images": "1", "num_steps": "40", "sampler": "heun"}))
        assert len(told.positions) == 40  # of 79 calls
        assert len(told.frames) == 25

    def test_nobody_waits(self, playground):
        with pytest.raises(CancelledError):
            Told(playground.sample(QUICK), cancelled=True)

    def test_edits(self, playground):
        run, first, second = playground.run, upload(PICTURES[0]), upload(PICTURES[1])
        mask = np.zeros((8, 8), np.uint8)
        mask[:, 4:] = 255
        form = QUICK | {"seed": "2", "num_images": "2", "t": "20"}
        same = {"num_steps": 4, "sampler": "ddim"} | WATCHED
        repeated = PICTURES[:1].repeat(8, axis=0)
        told = Told(playground.vary(form | {"picture": first}))
        assert near(told.pictures, run.vary(repeated, 20, 2, **same)[:2])
        told = Told(playground.inpaint(form | {"picture": first, "mask": upload(mask), "times": "2"}))
        assert near(told.pictures, run.inpaint(repeated, mask > 0, 2, times=2, **same)[:2])
        np.testing.assert_array_equal(told.pictures[..., :4, :], repeated[:2, :, :4])
        ends = {"first": first, "second": second}
        told = Told(playground.interpolate(form | ends))
        assert near(
            told.pictures, run.interpolate(PICTURES[0], PICTURES[1], np.resize([0.0, 1.0], 8), 20, 2, **same)[:2]
        )
        told = Told(playground.interpolate_latents(form | ends))
        assert near(
            told.pictures, run.interpolate_latents(PICTURES[0], PICTURES[1], np.resize([0.0, 1.0], 8), 4, **WATCHED)[:2]
        )
        assert len(told.frames) == 2

    def test_steps_are_at_most_those_from_t(self, playground):
        form = {"picture": upload(PICTURES[0]), "num_steps": "30", "sampler": "ddpm", "t": "3"}
        assert playground.vary(form).calls == 4

    def test_classes_and_guidance(self, classes):
        form = QUICK | {"seed": "1", "num_images": "3"}
        pictures = [Told(classes.sample(form | {"label": label})).pictures for label in ("0", "2", "")]
        for expected, found in zip(([0], [2], []), pictures, strict=True):
            assert near(found, classes.run.sample(8, 1, labels=expected, num_steps=4, sampler="ddim", **WATCHED)[:3])
        guided = classes.sample(form | {"label": "2", "guidance_scale": "4"})
        assert guided.weight == 2.0
        assert not near(Told(guided).pictures, pictures[1])

    def test_prompts_and_guidance(self, captioned):
        form = QUICK | {"seed": "1", "num_images": "3"}
        said = ({"prompt": " two "}, {}, {"prompt": "two", "negative_prompt": "one"})
        actions = [captioned.sample(form | {"guidance_scale": "2"} | texts) for texts in said]
        assert [*{action.program for action in actions}] == [("sample", True)]
        pictures = [Told(action).pictures for action in actions]
        same = {"num_steps": 4, "sampler": "ddim", "guidance_scale": 2} | WATCHED
        texts = ({"prompts": ["two"]}, {}, {"prompts": ["two"], "negative_prompts": ["one"]})
        for found, expected in zip(pictures, texts, strict=True):
            assert near(found, captioned.run.sample(8, 1, **expected, **same)[:3])
        assert not near(pictures[0], pictures[1])
        assert not near(pictures[0], pictures[2])

    def test_one_program_for_all_prompts(self, captioned):
        """The program compiled for an edit without a prompt also serves edits with one."""
        form = QUICK | {"picture": upload(PICTURES[0])}
        Told(captioned.vary(form))
        compiled = []
        jax.monitoring.register_event_duration_secs_listener(record := lambda name, *_, **__: compiled.append(name))
        try:
            Told(captioned.vary(form | {"prompt": "two"}))
            Told(captioned.vary(form | {"prompt": "a text that no one has said before"}))
        finally:
            jax.monitoring.unregister_event_duration_listener(record)
        assert "/jax/core/compile/backend_compile_duration" not in compiled


FIRST = {"first": upload(PICTURES[0])}
REFUSED = [
    ("sample", {"num_images": "9"}, "num_images is '9'; accepted: a whole number from 1 to 8"),
    ("sample", {"num_images": "0"}, "num_images is '0'"),
    ("sample", {"num_steps": "41"}, "num_steps is '41'; accepted: a whole number from 1 to 40"),
    ("sample", {"num_steps": "1e3"}, "num_steps is '1e3'"),
    ("sample", {"num_steps": "9" * 5000}, "num_steps is '9{40}'"),
    ("sample", {"seed": "-1"}, "seed is '-1'"),
    ("sample", {"sampler": "euler"}, "sampler is 'euler'; accepted: ddpm, ddim"),
    ("sample", {"spacing": "even"}, "spacing is 'even'"),
    ("sample", {"sampler": "ddim", "eta": "nan"}, "eta is 'nan'; accepted: a number from 0 to 1"),
    ("sample", {"sampler": "heun", "eta": "0.5"}, "'heun' takes no eta; accepted: ddim"),
    ("sample", {"label": "1"}, "this run is not class-conditional"),
    ("sample", {"label": "0"}, "this run is not class-conditional"),
    ("sample", {"guidance_scale": "2"}, "guidance_scale is 2.0; other than 1 it needs a run with"),
    ("sample", {"seed": upload(PICTURES[0])}, "seed is a file"),
    ("vary", {}, "picture is missing; accepted: a picture"),
    ("vary", {"picture": "data:0"}, "picture is missing"),
    ("interpolate", FIRST, "second is missing"),
    ("inpaint", {"picture": upload(PICTURES[0])}, "mask is missing"),
    ("inpaint", {"picture": upload(PICTURES[0]), "mask": upload(np.zeros((8, 8), np.uint8))}, "no part .* is marked"),
    ("inpaint", {"times": "2", "sampler": "heun"}, "times is 2; accepted with samplers other than ddpm and ddim: 1"),
    (
        "inpaint",
        {"times": "9", "num_steps": "10", "sampler": "ddim"},
        "takes 90 network calls; accepted: at most 80",
    ),
    ("training_page", {}, "this run's training set (has changed|is not in)"),
]


@pytest.mark.parametrize(("action", "form", "sentence"), REFUSED)
def test_refusals(playground, action, form, sentence):
    with pytest.raises(UserError, match=sentence):
        getattr(playground, action)(form)


@pytest.mark.parametrize(
    ("action", "form", "sentence"),
    [
        ("sample", {"prompt": "x" * 2001}, "^prompt has 2,001 characters; accepted: at most 2,000$"),
        ("sample", {"prompt": upload(PICTURES[0])}, "^prompt is a file"),
        ("sample", {"prompt": "\0"}, "contains a NUL character"),
        ("sample", {"label": "1"}, "this run is not class-conditional"),
        (
            "sample",
            {"prompt": "two", "negative_prompt": "one"},
            "^a negative prompt does nothing at a guidance_scale of 1; set another, such as guidance_scale=2$",
        ),
        ("vary", {"picture": upload(PICTURES[0]), "guidance_scale": "2"}, "guidance needs a prompt to steer towards"),
    ],
)
def test_refusals_of_a_run_with_captions(captioned, action, form, sentence):
    with pytest.raises(UserError, match=sentence):
        getattr(captioned, action)(form)


def test_guidance_to_begin_with(captioned, classes):
    assert (captioned.facts()["guidance_scale"], classes.facts()["guidance_scale"]) == (2, 1)
    captioned.run.config.sample.guidance_scale = 3.5
    assert captioned.facts()["guidance_scale"] == 3.5
    captioned.run.config.sample.guidance_scale = 1


def test_training_images_are_not_fetched(tmp_path):
    run = make_run()
    run.config.data.data_dir = str(tmp_path)
    facts = Playground(run, "tiny", 8).facts()
    assert facts["training_images"] == 0
    assert f"training set is not in '{tmp_path}" in facts["without_training_images"]
    assert not [*tmp_path.iterdir()]


def test_a_run_that_cannot_draw_without_a_class(classes):
    alone = Playground(make_run(devices=1, class_conditional=True), "tiny", 8)
    assert (alone.facts()["unconditional"], classes.facts()["unconditional"]) == (False, True)
    assert alone.facts()["edits"] == ["vary", "inpaint", "interpolate"]
    assert classes.facts()["edits"] == [*alone.facts()["edits"], "interpolate_latents"]
    with pytest.raises(UserError, match="images without a class"):
        alone.vary({"picture": upload(PICTURES[0])})
    with pytest.raises(UserError, match="images without a class"):
        alone.interpolate_latents({})
    with pytest.raises(UserError, match="guidance needs classes"):
        classes.vary({"picture": upload(PICTURES[0]), "guidance_scale": "2"})
    with pytest.raises(UserError, match="label is '3'; accepted: a whole number from 0 to 2"):
        classes.sample({"label": "3"})


class TestPageOfPrompts:
    @pytest.fixture
    def opened(self, captioned, page):
        listening, queue = socket.create_server(("127.0.0.1", 0)), Queue(1)
        server = Server(make_app(captioned, queue, "127.0.0.1"), queue)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        page.goto(f"http://127.0.0.1:{listening.getsockname()[1]}")
        page.wait_for_selector("#run:has-text('tiny')")
        page.select_option("[name=sampler]", "ddim")
        page.fill("[name=num_steps]", "4")
        yield page
        server.should_exit = True
        thread.join(PATIENCE)

    def pictures(self, page):
        page.evaluate("document.querySelector('#status').textContent = ''")
        page.keyboard.press("Enter")
        page.wait_for_selector("#status:has-text('Done in')")
        return decoded(page.eval_on_selector_all("#grid img", "images => images.map(image => image.src)"))

    def test_prompts(self, captioned, opened):
        page, same = opened, {"num_steps": 4, "sampler": "ddim"} | WATCHED
        prompt, negative = page.get_by_label("Prompt", exact=True), page.get_by_label("Negative prompt")
        suggestions = prompt.evaluate("input => [...input.list.options].map(option => option.value)")
        assert suggestions == ["one", "two", "<b>three</b> & more"]
        assert page.locator("b").count() == 0
        assert page.input_value("[name=guidance_scale]") == "2"
        negative.fill("one")
        prompt.fill("two")
        said = {"prompts": ["two"], "negative_prompts": ["one"], "guidance_scale": 2}
        assert near(self.pictures(page), captioned.run.sample(8, 0, **said, **same))
        # Where there is no guidance, the negative prompt cannot be written and is not sent.
        page.fill("[name=guidance_scale]", "1")
        assert negative.is_disabled()
        assert near(self.pictures(page), captioned.run.sample(8, 0, prompts=["two"], **same))

    def test_an_edit_without_a_prompt_has_no_guidance(self, captioned, opened):
        page = opened
        page.check("[value=vary]", force=True)
        picture = {"name": "a.png", "mimeType": "image/png", "buffer": upload(PICTURES[0]).file.read()}
        page.set_input_files(".slot[data-slot=first] input[type=file]", picture)
        page.wait_for_selector(".slot[data-slot=first] .full")
        assert not page.is_visible("[name=guidance_scale]")
        page.focus("[name=prompt]")
        expected = captioned.run.vary(PICTURES[:1].repeat(8, axis=0), 20, 0, num_steps=4, sampler="ddim", **WATCHED)
        assert near(self.pictures(page), expected)
        page.fill("[name=prompt]", "two")
        assert page.is_visible("[name=guidance_scale]")
