"""Pictures as the network receives them: cropped, scaled, converted and rotated; always from real files."""

import io

import numpy as np
import pytest
from picture_files import BLUE, GREEN, RED, WHITE, folder, save, stripes
from PIL import Image

from ddpm_jax.data.pictures import Fit, open_picture


def reopened(path, image, channels=3, **options):
    """One picture as read by the source at its own size: nested lists of the first row's pixels."""
    save(path / "picture.png", image, **options)
    with Image.open(path / "picture.png") as saved:
        width, height = saved.size
    return folder(path, height, width, channels)[0]["image"][0].tolist()


@pytest.mark.parametrize("transposed", [False, True], ids=["wide", "tall"])
@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (stripes((0,) * 3, WHITE, width=8), [0, 0, 255, 255]),
        (stripes((9,) * 3, (70,) * 3, (200,) * 3), [70, 70, 70, 70]),
        (stripes((9,) * 3, (70,) * 3, (90,) * 3, (200,) * 3, width=2), [70, 70, 90, 90]),
    ],
)
def test_crop_takes_the_centre(tmp_path, picture, expected, transposed):
    picture = picture.swapaxes(0, 1) if transposed else picture
    save(tmp_path / "a.png", picture)
    image = folder(tmp_path)[0]["image"]
    image = image.swapaxes(0, 1) if transposed else image
    np.testing.assert_array_equal(image, np.broadcast_to(np.array(expected)[None, :, None], (4, 4, 3)))


@pytest.mark.parametrize("transposed", [False, True], ids=["wide", "tall"])
@pytest.mark.parametrize("scale", [6, 2, 0.5], ids=["reduced", "halved", "enlarged"])
def test_scaled_to_cover_and_cropped(tmp_path, scale, transposed):
    """The middle one of three square stripes fills the picture except for the blur at its border."""
    side = int(16 * scale)
    picture = stripes(RED, GREEN, BLUE, width=side, height=side)
    save(tmp_path / "a.png", picture.swapaxes(0, 1) if transposed else picture)
    image = folder(tmp_path, 16, 16)[0]["image"]
    image = image.swapaxes(0, 1) if transposed else image
    assert (image[:, 6:-6] == GREEN).all()
    left, right = image[:, :4].astype(int).sum((0, 1)), image[:, -4:].astype(int).sum((0, 1))
    np.testing.assert_array_equal(left, right[::-1])
    assert left[0] < left[1] / 4


def test_height_and_width_are_not_mixed_up(tmp_path):
    save(tmp_path / "a.png", stripes(RED, GREEN, width=4, height=4))
    np.testing.assert_array_equal(folder(tmp_path, height=4, width=8)[0]["image"], stripes(RED, GREEN))
    assert folder(tmp_path, height=8, width=2)[0]["image"].shape == (8, 2, 3)


@pytest.mark.parametrize(
    ("picture", "channels", "expected"),
    [
        ([[RED, GREEN, BLUE]], 1, [[76], [150], [29]]),  # 0.299 R + 0.587 G + 0.114 B
        ([[10, 200]], 3, [[10] * 3, [200] * 3]),
        ([[10, 200]], 1, [[10], [200]]),
        (
            [[(*RED, 255), (*RED, 0), (0, 0, 0, 0), (9, 8, 7, 255)]],
            3,
            [[255, 0, 0], [255] * 3, [255] * 3, [9, 8, 7]],
        ),
        ([[(0, 0, 0, 255), (0, 0, 0, 0)]], 1, [[0], [255]]),
        (Image.fromarray(np.array([[(7, 255), (7, 0)]], np.uint8), "LA"), 1, [[7], [255]]),
        (Image.fromarray(np.array([[0, 257 * 7, 257 * 128, 65535]], np.uint16)), 1, [[0], [7], [128], [255]]),
        (Image.fromarray(np.array([[257 * 7, 65535]], np.uint16)), 3, [[7] * 3, [255] * 3]),
        (Image.fromarray(np.array([[True, False]])), 3, [[255] * 3, [0] * 3]),
    ],
    ids=["rgb-grey", "grey-rgb", "grey", "rgba", "rgba-grey", "grey-alpha", "16-bit", "16-bit-rgb", "1-bit"],
)
def test_colour_modes(tmp_path, picture, channels, expected):
    assert reopened(tmp_path, picture, channels) == expected


def test_half_transparent_is_mixed_with_white(tmp_path):
    (pixel,) = reopened(tmp_path, [[(0, 100, 255, 128)]])
    np.testing.assert_allclose(pixel, 255 + (np.array([0, 100, 255]) - 255) * 128 / 255, atol=1)


@pytest.mark.parametrize(
    ("transparency", "expected"),
    [
        (None, [[255, 0, 0], [0, 255, 0], [0, 0, 255]]),
        (1, [[255, 0, 0], [255] * 3, [0, 0, 255]]),
        (bytes([255, 255, 0]), [[255, 0, 0], [0, 255, 0], [255] * 3]),
    ],
)
def test_palette_with_transparency(tmp_path, transparency, expected):
    picture = Image.new("P", (3, 1))
    picture.putpalette([*RED, *GREEN, *BLUE])
    picture.putdata([0, 1, 2])
    options = {} if transparency is None else {"transparency": transparency}
    assert reopened(tmp_path, picture, **options) == expected


def test_transparent_colour_without_alpha(tmp_path):
    assert reopened(tmp_path, [[RED, BLUE]], transparency=BLUE) == [[255, 0, 0], [255] * 3]
    assert reopened(tmp_path, [[10, 200]], 1, transparency=10) == [[255], [200]]


UPRIGHT = np.array([[0, 50, 100], [150, 200, 250]])
STORED = {  # orientation: the pixels that a camera stored for the picture UPRIGHT
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.T,
    6: np.rot90(UPRIGHT),
    7: UPRIGHT[::-1, ::-1].T,
    8: np.rot90(UPRIGHT, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "a.png", STORED[orientation], exif=exif)
    np.testing.assert_array_equal(folder(tmp_path, 2, 3, 1)[0]["image"][..., 0], UPRIGHT)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_large_jpeg_decoded_at_a_part_of_its_size_looks_the_same(tmp_path, orientation, mode):
    """Like the same pixels in a file that is always decoded at full size; 800 pixels are five times the final size."""
    rng = np.random.default_rng(0)
    scene = Image.fromarray(rng.integers(0, 256, (20, 15, 3), np.uint8)).resize((600, 800), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "a.jpg", scene.convert(mode), quality=95, exif=exif)
    with Image.open(tmp_path / "a.jpg") as whole:
        save(tmp_path / "b.png", whole, exif=exif)
    small, whole = (example["image"].astype(float) for example in folder(tmp_path, 120, 120, 3))
    assert 0 < np.abs(small - whole).mean() < 1.0


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (33, 50), (150, 170), (301, 640)])
@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_has_pillow_s_bits(mode, options, width, height, channels):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8))
    buffer = io.BytesIO()
    noise.resize((width, height)).convert(mode).save(buffer, "jpeg", **options)
    fit = Fit(64, 64, channels)
    with Image.open(io.BytesIO(buffer.getvalue())) as image:
        image.draft(image.mode, (128, 128))
        expected = fit(image)
    np.testing.assert_array_equal(open_picture(buffer.getvalue(), fit), expected)


def test_jpeg_turned_by_xmp():
    buffer = io.BytesIO()
    Image.fromarray(np.tile(np.arange(40, dtype=np.uint8) * 6, (20, 1))).save(buffer, "jpeg", quality=95)
    data = buffer.getvalue()
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = data[:2] + b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp + data[2:]
    picture = open_picture(data, Fit(40, 20, 1))
    assert (np.diff(picture[:, 0, 0].astype(int)) >= 0).mean() > 0.9  # it grows downwards now


@pytest.mark.parametrize(
    ("formats", "said"),
    [
        (None, "it is not a picture of a known format, or damaged"),
        (("PNG", "JPEG"), "it is not one of PNG, JPEG, or damaged"),
    ],
)
def test_files_that_are_not_pictures(tmp_path, formats, said):
    path = tmp_path / "a.png"
    path.write_bytes(b"no picture")
    for file in (path, path.read_bytes(), path.open("rb")):
        with pytest.raises(ValueError, match="^" + said + "$"):
            open_picture(file, Fit(8, 8, 1), formats)
