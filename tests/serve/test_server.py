"""The playground from a user's perspective: a real server for a tiny run, by HTTP and in a browser."""

import base64
import http.client
import io
import json
import re
import signal
import struct
import sys
import zlib

import numpy as np
import pytest
import requests
from PIL import Image
from runs import PATIENCE
from tiny import make_run, near

import ddpm_jax
from ddpm_jax.commands.job import Job
from ddpm_jax.commands.serve import serve
from ddpm_jax.runtime.errors import UserError

pytestmark = pytest.mark.slow
QUICK = {"num_steps": "6", "sampler": "ddim"}


class Server:
    def __init__(self, process):
        self.process = process
        self.said = []
        while not self.said or "http://" not in self.said[-1]:
            self.said.append(process.stdout.readline())
            assert self.said[-1], self.said
        self.url = re.search(r"http://127\.0\.0\.1:\d+", self.said[-1])[0]

    def post(self, path, fields=QUICK, stream=False, headers=None, **files):
        # None: a form of files alone is of another type than one of fields.
        parts = {name: (None, value) for name, value in fields.items()} | files
        return requests.post(f"{self.url}/api/{path}", files=parts, stream=stream, headers=headers, timeout=PATIENCE)

    def pictures(self, path, fields=QUICK, **files):
        """The last line of a finished action."""
        response = self.post(path, fields, **files)
        assert response.status_code == 200, response.text
        events = [json.loads(line) for line in response.text.splitlines()]
        assert events[-1]["state"] == "done", events
        return np.stack([decoded(url) for url in events[-1]["pictures"]]), events

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        output, _ = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, "".join(self.said) + output


@pytest.fixture(scope="module")
def server(trained, start):
    server = Server(start("--mode=serve", f"--workdir={trained[0]}", "--port=0", "--queue=1", config=None))
    yield server
    if server.process.poll() is None:
        server.end()


def decoded(url):
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))
    return picture.reshape(*picture.shape[:2], -1)


def png(picture, name="a.png"):
    file = io.BytesIO()
    Image.fromarray(np.asarray(picture, np.uint8)).save(file, "PNG")
    return (name, file.getvalue())


def bomb(side):
    """The beginning of a PNG with this picture size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


class TestServer:
    def test_samples_are_the_runs(self, server, trained):
        """The same images as elsewhere with this seed, preceded by intermediate images."""
        before = files_of(trained[0])
        pictures, events = server.pictures("sample", QUICK | {"seed": "7", "num_images": "5"})
        expected = ddpm_jax.load(trained[0]).sample(8, 7, num_steps=6, sampler="ddim")
        assert near(pictures, expected[:5])
        states = [event["state"] for event in events]
        assert states[-1] == "done"
        assert {"compiling", "running"} & {*states[:-1]}
        shown = [event for event in events if "pictures" in event]
        assert [(event["done"], event["calls"]) for event in shown[:-1]] == [(2, 6), (4, 6), (6, 6)]
        assert files_of(trained[0]) == before

    def test_pictures_that_are_brought(self, server):
        """They are cropped and scaled as usual, and unpainted parts are kept bit for bit."""
        wide = np.zeros((40, 80), np.uint8)
        wide[:, 40:] = 255
        picture = decoded(server.post("fit", {}, picture=png(wide)).json()["picture"])
        assert picture.shape == (8, 8, 1)
        assert (picture[:, 0], picture[:, -1]) == (pytest.approx(0, abs=9), pytest.approx(255, abs=9))
        mask = np.zeros((8, 8))
        mask[2:6, 2:6] = 255
        painted, _ = server.pictures("inpaint", picture=png(picture[..., 0]), mask=png(mask))
        kept = np.broadcast_to(mask == 0, (8, 8, 8))
        np.testing.assert_array_equal(painted[..., 0][kept], np.broadcast_to(picture[..., 0], (8, 8, 8))[kept])
        assert not near(painted[0], painted[1])

    def test_training_images(self, server, trained):
        found = requests.get(f"{server.url}/api/training_images?first=1795&count=9", timeout=PATIENCE).json()
        assert len(found["pictures"]) == 2
        response = requests.get(f"{server.url}/api/training_images?first=1797", timeout=PATIENCE)
        assert (response.status_code, response.json()["error"]) == (
            400,
            "first is '1797'; accepted: a whole number from 0 to 1796",
        )

    @pytest.mark.parametrize(
        ("picture", "status", "sentence"),
        [
            (b"", 400, "picture cannot be read as a picture: it is not one of PNG, JPEG, WEBP, BMP"),
            (b"GIF89a" + bytes(100), 400, "not one of PNG"),
            (png(np.ones((9, 9)))[1][:-30], 400, "picture cannot be read as a picture: "),
            (bomb(5000), 400, "5000x5000 is more than the limit of 16000000 pixels"),
            (bomb(60000), 400, "picture cannot be read as a picture: "),
            (bytes((16 << 20) + 1), 413, "the request is too large; accepted: at most 16 MiB"),
        ],
        ids=["empty", "gif", "broken", "bomb", "larger bomb", "large file"],
    )
    def test_bad_pictures(self, server, picture, status, sentence):
        response = server.post("fit", {}, picture=("a.png", picture))
        assert (response.status_code, sentence in response.json()["error"]) == (status, True), response.text

    def test_a_body_without_end_is_broken_off(self, server):
        """A request without a content length cannot send more, either."""
        head = b'--x\r\ncontent-disposition: form-data; name="picture"; filename="a.png"\r\n\r\n'
        connection = http.client.HTTPConnection(server.url.partition("//")[2], timeout=PATIENCE)
        sent = 0

        def endless():
            nonlocal sent
            yield head
            while True:
                sent += 1 << 16
                yield bytes(1 << 16)

        headers = {"content-type": "multipart/form-data; boundary=x"}
        with pytest.raises(OSError, match=r"Broken pipe|reset|Protocol"):
            connection.request("POST", "/api/fit", endless(), headers, encode_chunked=True)
        assert sent < 80 << 20
        assert server.pictures("sample")[0].shape == (8, 8, 8, 1)

    @pytest.mark.parametrize(
        ("path", "headers", "body", "status", "sentence"),
        [
            ("sample", {}, b"a=1", 400, "the request is not a form"),
            (
                "sample",
                {"content-type": "multipart/form-data"},
                b"",
                400,
                "the form cannot be read: Missing boundary",
            ),
            ("sample", {"content-type": "multipart/form-data; boundary=x"}, b"nonsense", 400, "cannot be read: "),
            ("nothing", {"content-type": "multipart/form-data; boundary=x"}, b"", 404, "nothing at this address"),
            ("sample", {"host": "evil.example"}, b"", 400, "is at 127.0.0.1, not at 'evil.example'"),
            ("sample", {"host": "127.0.0.1.evil.example:80"}, b"", 400, "not at '127.0.0.1.evil.example'"),
            ("sample", {"origin": "http://evil.example"}, b"", 403, "another site's page"),
            ("sample", {"origin": "null"}, b"", 403, "another site's page"),
            ("sample", {"sec-fetch-site": "cross-site"}, b"", 403, "another site's page"),
        ],
    )
    def test_refusals(self, server, path, headers, body, status, sentence):
        response = requests.post(f"{server.url}/api/{path}", body, headers=headers, timeout=PATIENCE)
        assert (response.status_code, sentence in response.json()["error"]) == (status, True), response.text

    def test_nothing_is_computed_for_a_get(self, server):
        response = requests.get(f"{server.url}/api/sample", timeout=PATIENCE)
        assert (response.status_code, response.json()["error"]) == (405, "this address does not accept this method")

    @pytest.mark.parametrize("path", ["/", "/page.js", "/page.css", "/api/run", "/nothing", "/../pyproject.toml"])
    def test_every_answer_has_its_guards(self, server, path):
        response = requests.get(server.url + path, timeout=PATIENCE)
        assert response.status_code == (404 if "nothing" in path or "toml" in path else 200)
        assert response.headers["content-security-policy"].startswith("default-src 'self'; ")
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "://" not in response.text.replace("http://www.w3.org/", "")  # nothing of elsewhere
        assert "server" not in response.headers
        wrong = requests.get(server.url + path, headers={"host": "evil.example"}, timeout=PATIENCE)
        assert wrong.status_code == 400

    def test_the_queue_is_bounded(self, server):
        """While one compiles and one waits, the next must retry later; disconnecting frees the place."""
        first = server.post("sample", {"sampler": "ddpm", "num_steps": "50", "num_images": "1"}, stream=True)
        forms = [{"sampler": "ddim", "num_steps": str(50 - i)} for i in range(12)]
        begun, waiting, refused = [first], [], []
        for form in forms:
            response = server.post("sample", form, stream=True)
            if response.status_code == 503:
                refused.append(response)
                break
            begun.append(response)
            event = json.loads(next(response.iter_lines()))
            if event["state"] == "waiting":
                waiting.append(event)
        assert refused, "the queue never was full"
        assert waiting[0]["ahead"] == 1
        assert refused[0].json()["error"].startswith("the queue is full: 1 requests are waiting")
        assert int(refused[0].headers["retry-after"]) >= 1
        for response in begun:
            response.close()
        assert server.pictures("sample")[0].shape == (8, 8, 8, 1)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_ends_with_a_word(self, trained, start, number):
        server = Server(start("--mode=serve", f"--workdir={trained[0]}", "--port=0", "--raw", config=None))
        assert "step 24, raw weights: http://127.0.0.1:" in server.said[-1]
        # Three others come first, so that the last is not done before the signal arrives.
        forms = [QUICK | {"num_steps": str(num_steps)} for num_steps in (9, 8, 7, 6)]
        responses = [server.post("sample", form, stream=True) for form in forms]
        lines = responses[-1].iter_lines()
        assert json.loads(next(lines))["state"] == "waiting"
        status, output = server.end(number)
        assert json.loads([*lines][-1]) == {"state": "failed", "error": "the playground is shutting down"}
        assert (status, output.splitlines()[-1]) == (0, "the playground has stopped"), output
        assert len(output.splitlines()) == 2, output


class TestWithoutServer:
    def serve(self, **where):
        serve(Job(make_run(), None), **{"host": "127.0.0.1", "port": 0, "queue": 1, "batch_size": None, **where})

    def test_without_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "uvicorn", None)
        with pytest.raises(UserError, match=r"needs uvicorn, which is not installed: pip install -e '\.\[serve\]'"):
            self.serve()

    def test_a_port_that_is_taken(self, server):
        with pytest.raises(UserError, match=r"--port=\d+: cannot listen there: Address already in use"):
            self.serve(port=int(server.url.rpartition(":")[2]))

    def test_flags_that_would_do_nothing(self, call, trained):
        status, output = call("--mode=serve", f"--workdir={trained[0]}", "--sampler=ddim", config=None)
        assert (status, output) == (1, "error: --sampler does nothing with --mode=serve\n")


def sources(page, selector="#grid img"):
    return page.eval_on_selector_all(selector, "images => images.map(image => image.src)")


def done(page, button):
    page.click(f"#go:has-text('{button}')")
    page.wait_for_selector("#status:has-text('Done in')")
    assert not page.is_disabled("#go")
    assert page.is_disabled("#cancel")


def choose_training_image(page, slot, number):
    page.click(f".slot[data-slot={slot}] .training")
    page.click(f"img[alt='Training image {number}']")
    return page.get_attribute(f".slot[data-slot={slot}] .preview img", "src")


class TestPage:
    @pytest.fixture(autouse=True)
    def opened(self, page, server, trained):
        page.goto(server.url)
        page.wait_for_selector(f"#run:has-text('{trained[0].name} · 8x8 · step 24, EMA 0.99')")

    def test_sample_and_watch(self, page):
        page.fill("[name=num_images]", "4")
        page.fill("[name=num_steps]", "12")
        done(page, "Sample")
        first = sources(page)
        assert len({*first}) == 4
        assert page.eval_on_selector_all("#grid img", "images => images.map(image => image.naturalWidth)") == [8] * 4
        slider = page.locator("#replay input")
        assert int(slider.get_attribute("max")) == 6  # every other call, and the result
        slider.fill("0")
        assert not {*first} & {*sources(page)}
        done(page, "Sample")
        assert sources(page) == first
        page.click("#another")
        done(page, "Sample")
        assert not {*first} & {*sources(page)}

    def test_interpolate(self, page):
        page.check("[value=interpolate]", force=True)
        page.click("#go")
        assert "Choose a picture first" in page.inner_text("#status")
        ends = [choose_training_image(page, slot, number) for slot, number in (("first", 3), ("second", 5))]
        page.fill("[name=num_steps]", "6")
        rows = []
        for way in ("interpolate", "interpolate_latents"):
            page.select_option("[name=way]", way)
            assert page.is_visible("[name=seed]") == (way == "interpolate")
            done(page, "Interpolate")
            rows.append(sources(page))
            assert len(rows[-1]) == 10
            assert (rows[-1][0], rows[-1][-1]) == tuple(ends)
        assert rows[0] != rows[1]

    def test_paint_and_inpaint(self, page):
        page.set_input_files(".slot[data-slot=first] input[type=file]", [])  # nothing is chosen
        page.check("[value=inpaint]", force=True)
        picture = {"name": "a.png", "mimeType": "image/png", "buffer": png(np.full((30, 20), 80))[1]}
        page.set_input_files(".slot[data-slot=first] input[type=file]", picture)
        canvas, painted = page.locator("#canvas"), "#canvas[aria-label='The picture, {} % of it painted over']"
        page.wait_for_selector(painted.format(0))
        page.click("#go")
        assert "Paint over the part" in page.inner_text("#status")
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        place = lambda x, y: (box["x"] + box["width"] * x / 8, box["y"] + box["height"] * y / 8)  # noqa: E731
        page.fill("#brush", "1")
        page.mouse.move(*place(1.5, 2.5))
        page.mouse.down()
        page.mouse.move(*place(5.5, 2.5), steps=3)
        page.mouse.up()
        page.wait_for_selector(painted.format(8))  # 5 of 64
        canvas.focus()
        for key in (*["ArrowDown"] * 2, "Space"):
            page.keyboard.press(key)
        page.wait_for_selector(painted.format(9))
        page.fill("[name=num_steps]", "6")
        done(page, "Inpaint")
        changed = np.zeros((8, 8), bool)
        for url in sources(page):
            changed |= decoded(url)[..., 0] != 80
        where = np.zeros((8, 8), bool)
        where[2, 1:6] = where[6, 4] = True
        np.testing.assert_array_equal(changed, where)
        page.click("#clear")
        page.wait_for_selector(painted.format(0))

    def test_going_on_with_a_picture(self, page):
        done(page, "Sample")
        chosen = sources(page)[2]
        page.click("#grid button >> nth=2")
        assert page.get_attribute("#save", "href") == chosen
        page.click("[data-use=vary]")
        assert page.get_attribute(".slot[data-slot=first] .preview img", "src") == chosen
        page.fill("[name=t]", "10")
        done(page, "Vary")
        assert chosen not in sources(page)

    def test_cancel(self, page, server):
        page.select_option("[name=sampler]", "ddpm")
        page.fill("[name=num_steps]", "50")
        server.process.send_signal(signal.SIGSTOP)  # or it might be done before the click
        page.click("#go")
        page.click("#cancel")
        page.wait_for_selector("#status:has-text('Cancelled.')")
        server.process.send_signal(signal.SIGCONT)
        done(page, "Sample")

    @pytest.mark.parametrize("width", [320, 1200])
    def test_fits_the_screen(self, page, width):
        page.set_viewport_size({"width": width, "height": 700})
        choose = ("sample", "interpolate", "vary", "inpaint")
        for mode in choose:
            page.check(f"[value={mode}]", force=True)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), mode
        names = page.evaluate(
            "[...document.querySelectorAll('input, select, canvas, button')].filter(e => e.checkVisibility())"
            ".map(e => e.getAttribute('aria-label') ?? (e.labels?.[0] ?? e).textContent.trim())"
        )
        assert all(names), names
