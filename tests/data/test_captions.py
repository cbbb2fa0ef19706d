import json

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.data.captions import read_captions
from ddpm_jax.data.sources import open_source
from ddpm_jax.runtime.errors import UserError

SIZE = {"height": 4, "width": 4, "channels": 3, "captions": True}


@pytest.fixture
def folder(tmp_path):
    """Two pictures at the top and one in a folder."""
    for index, name in enumerate(("a.png", "b.jpg", "sub/c.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (index * 80, 0, 0)).save(tmp_path / name)
    return tmp_path


def captions(folder):
    source = open_source("folder", path=str(folder), **SIZE)
    return list(source.captions)


def test_a_text_beside_each_picture(folder):
    (folder / "a.txt").write_text("a cat\n\n  a sleeping cat \n", "utf-8")
    (folder / "b.txt").write_text("\ufeffein Hund \U0001f415", "utf-8")
    (folder / "sub" / "c.txt").write_text("\u0642\u0637\u0629", "utf-8")
    assert captions(folder) == [("a cat", "a sleeping cat"), ("ein Hund \U0001f415",), ("\u0642\u0637\u0629",)]


def test_csv_with_several_rows_a_picture(folder):
    rows = 'file_name,other,text\nb.jpg,1,"a dog, brown"\na.png,2,a cat\n./a.png,3,a sleeping cat\nsub/c.png,4,x\n'
    (folder / "metadata.csv").write_text(rows)
    assert captions(folder) == [("a cat", "a sleeping cat"), ("a dog, brown",), ("x",)]


def test_jsonl_in_folders_with_lists(folder):
    lines = [{"file_name": "a.png", "text": ["one", "two"]}, {"file_name": "b.jpg", "text": "three"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (folder / "sub" / "metadata.jsonl").write_text(json.dumps({"file_name": "c.png", "text": "four"}))
    assert captions(folder) == [("one", "two"), ("three",), ("four",)]


def test_the_fingerprint_is_of_the_captions_too(folder):
    for name in ("a", "b", "sub/c"):
        (folder / f"{name}.txt").write_text(name)
    first = open_source("folder", path=str(folder), **SIZE).describe()["fingerprint"]
    (folder / "a.txt").write_text("another")
    assert open_source("folder", path=str(folder), **SIZE).describe()["fingerprint"] != first


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("b.txt", None, r"image '.*b\.jpg' has no caption; accepted: a 'b\.txt' beside it"),
        ("b.txt", b"", r"caption '.*b\.txt' is empty"),
        ("b.txt", b" \n\n", r"caption '.*b\.txt' is empty"),
        ("b.txt", b"caf\xe9", r"caption '.*b\.txt' is not UTF-8 text: .* at byte 3"),
        ("metadata.csv", b"file_name,text\na.png,x\n", r"image '.*b\.jpg' has no caption: no row in '.*metadata\.csv'"),
        ("metadata.csv", b"file,text\na.png,x\n", r"row 1 of '.*metadata\.csv' has no 'file_name'; it has file, text"),
        ("metadata.csv", b"file_name,text\na.png,  \n", r"the text in row 1 of '.*metadata\.csv' is empty"),
        ("metadata.csv", b"file_name,text\na.png,caf\xe9\n", r"metadata\.csv' is not UTF-8 text"),
        ("metadata.jsonl", b'{"file_name": "a.png"', r"line 1 of '.*metadata\.jsonl' is not valid JSON"),
        ("metadata.jsonl", b'["a.png"]', r"line 1 of '.*metadata\.jsonl' is not a JSON object"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": 3}', r"the text in row 1 of '.*metadata\.jsonl' is empty"),
    ],
)
def test_refused(folder, name, content, said):
    for stem in ("a", "b", "sub/c"):
        (folder / f"{stem}.txt").write_text(stem)
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_captions(folder, ["a.png", "b.jpg", "sub/c.png"])


class TestArrays:
    IMAGES = np.zeros((2, 4, 4, 3), np.uint8)

    def open(self, tmp_path, **arrays):
        np.savez(tmp_path / "x.npz", image=self.IMAGES, **arrays)
        return open_source("array", path=str(tmp_path / "x.npz"), **SIZE)

    def test_one_or_several_captions(self, tmp_path):
        source = self.open(tmp_path, caption=np.array(["a", "b c"]))
        assert source.captions == [("a",), ("b c",)]
        source = self.open(tmp_path, text=np.array([["a", "b"], ["c", ""]]))
        assert source.captions == [("a", "b"), ("c",)]

    @pytest.mark.parametrize(
        ("captions", "said"),
        [
            (None, "has no captions; one of caption, captions, text must hold strings"),
            (np.arange(2), r"has captions int64 \(2,\)"),
            (np.array(["a"]), r"has captions <U1 \(1,\)"),
            (np.array(["a", " "]), "has no caption for image 1"),
        ],
    )
    def test_refused(self, tmp_path, captions, said):
        with pytest.raises(UserError, match=said):
            self.open(tmp_path, **({} if captions is None else {"caption": captions}))
