import re

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ddpm_jax.runtime import images
from ddpm_jax.runtime.files import atomic_path, write_text

LEVELS = np.arange(256, dtype=np.uint8)


def pictures(count, height=2, width=3, channels=3):
    return np.random.default_rng(0).integers(0, 255, (count, height, width, channels), np.uint8)


def test_all_levels_come_back():
    scaled = LEVELS.astype(np.float32) / np.float32(127.5) - 1
    result = images.to_uint8(scaled)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, LEVELS)


@pytest.mark.parametrize("offset", [-0.49, 0.49])
def test_rounds_to_the_nearest_level(offset):
    np.testing.assert_array_equal(images.to_uint8((LEVELS + offset) / 127.5 - 1), LEVELS)


def test_clips():
    np.testing.assert_array_equal(images.to_uint8([-1.01, -7.0, -np.inf, 1.01, 3.0, np.inf]), [0, 0, 0, 255, 255, 255])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("count", "columns", "rows_and_columns"),
    [(1, None, (1, 1)), (4, None, (2, 2)), (5, None, (2, 3)), (5, 2, (3, 2)), (3, 5, (1, 5)), (64, None, (8, 8))],
)
@pytest.mark.parametrize("gap", [0, 2])
def test_grid(count, columns, rows_and_columns, gap, channels):
    parts = pictures(count, channels=channels)
    canvas = images.grid(parts, columns, tile=1, gap=gap)
    rows, columns = rows_and_columns
    assert canvas.dtype == np.uint8
    assert canvas.shape == (rows * (2 + gap) + gap, columns * (3 + gap) + gap, channels)
    expected = np.full_like(canvas, 255)
    for index, part in enumerate(parts):
        top, left = gap + index // columns * (2 + gap), gap + index % columns * (3 + gap)
        expected[top : top + 2, left : left + 3] = part
    np.testing.assert_array_equal(canvas, expected)


@pytest.mark.parametrize(
    ("height", "width", "tile", "factor"),
    [(8, 8, 64, 8), (10, 8, 64, 6), (8, 10, 64, 6), (64, 64, 64, 1), (70, 9, 64, 1)],
)
def test_small_images_are_enlarged_by_a_whole_factor(height, width, tile, factor):
    parts = pictures(2, height, width, 1)
    canvas = images.grid(parts, tile=tile, gap=1)
    assert canvas.shape == (factor * height + 2, 2 * factor * width + 3, 1)
    second = canvas[1:-1, factor * width + 2 : -1]
    np.testing.assert_array_equal(second, np.kron(parts[1], np.ones((factor, factor, 1), np.uint8)))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
@pytest.mark.parametrize(
    ("shape", "columns", "rows_and_columns"),
    [((), None, (1, 1)), ((5,), None, (2, 3)), ((5,), 2, (3, 2)), ((2, 4), None, (2, 4)), ((3, 1), None, (3, 1))],
)
def test_show(shape, columns, rows_and_columns, channels, mode):
    parts = pictures(int(np.prod(shape)), channels=channels)
    shown = images.show(parts.reshape(*shape, 2, 3, channels), columns, tile=9, gap=1)
    assert isinstance(shown, Image.Image)
    assert shown.mode == mode
    expected = images.grid(parts, rows_and_columns[1], tile=9, gap=1)
    np.testing.assert_array_equal(np.asarray(shown).reshape(expected.shape), expected)
    assert expected.shape[:2] == (rows_and_columns[0] * 7 + 1, rows_and_columns[1] * 10 + 1)


def test_a_notebook_can_display_it():
    assert images.show(pictures(3))._repr_png_().startswith(b"\x89PNG")


def test_show_takes_jax_arrays():
    parts = pictures(2)
    np.testing.assert_array_equal(np.asarray(images.show(jnp.asarray(parts))), np.asarray(images.show(parts)))


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((2, 4, 4, 1), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((2, 4, 4, 2), np.uint8),
        np.zeros((0, 4, 4, 1), np.uint8),
        np.zeros((1, 1, 2, 4, 4, 1), np.uint8),
        [],
    ],
)
def test_show_says_what_it_takes(wrong):
    array = np.asarray(wrong)
    with pytest.raises(ValueError, match=re.escape(f"the images are {array.dtype} of shape {array.shape}; accepted: ")):
        images.show(wrong)


@pytest.mark.parametrize(("shape", "columns"), [((2,), 0), ((2,), -1), ((2, 2), 2)])
def test_show_refuses_columns_that_do_not_fit(shape, columns):
    with pytest.raises(ValueError, match=f"columns is {columns}; accepted: "):
        images.show(np.zeros((*shape, 2, 3, 1), np.uint8), columns)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_saved_picture_comes_back(tmp_path, channels, mode):
    (picture,) = pictures(1, 5, 7, channels)
    path = images.save(str(tmp_path / "new/folder/a.png"), picture)
    assert path == tmp_path / "new/folder/a.png"
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", mode)
        np.testing.assert_array_equal(np.asarray(image).reshape(5, 7, channels), picture)
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


def test_the_ending_names_the_format(tmp_path):
    with Image.open(images.save(tmp_path / "a.bmp", pictures(1)[0])) as image:
        assert image.format == "BMP"


@pytest.mark.parametrize(
    ("name", "picture"), [("a.png", np.zeros((2, 2, 3), np.complex64)), ("a.unknown", np.zeros((2, 2, 3), np.uint8))]
)
def test_failed_save_leaves_what_was_there(tmp_path, name, picture):
    (tmp_path / name).write_bytes(b"old")
    with pytest.raises((TypeError, ValueError)):
        images.save(tmp_path / name, picture)
    assert (tmp_path / name).read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_atomic_path_replaces_at_the_end(tmp_path):
    path = tmp_path / "new/file.txt"
    write_text(path, "old")
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.suffix == path.suffix
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [True, False])
def test_atomic_path_leaves_the_old_content_after_an_exception(tmp_path, error, exists):
    path = tmp_path / "file.txt"
    if exists:
        path.write_text("old")

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == ([("file.txt", "old")] if exists else [])


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
@pytest.mark.parametrize("channels", [1, 3])
def test_animation(tmp_path, suffix, channels):
    frames = np.stack([np.full((8, 9, channels), level, np.uint8) for level in (0, 120, 250)])
    path = images.save_animation(tmp_path / f"a{suffix}", frames, milliseconds=100)
    with Image.open(path) as animation:
        assert (animation.n_frames, animation.size) == (3, (9, 8))
        assert animation.info["loop"] == 0
        for number, frame in enumerate(frames):
            animation.seek(number)
            assert np.abs(np.asarray(animation.convert("RGB")).astype(int) - frame).max() <= 2
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_floats_come_back():
    np.testing.assert_array_equal(images.to_uint8(images.to_float(LEVELS)), LEVELS)
    assert images.to_float(LEVELS).dtype == np.float32
