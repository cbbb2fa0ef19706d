"""Pictures and texts as a CLIP sees them; the numbers themselves are tested in evaluation/test_agreement.py."""

import clips
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from ddpm_jax.interop import transformers as interop
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.sampling.clip import embed_pictures, embed_texts, prepare

PICTURES = np.random.default_rng(0).integers(0, 256, (7, 9, 14, 3), np.uint8)


def one():
    return Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return interop.read_clip(interop.write_clip(folder / "clip", clips.make_clip(folder / "tokenizer")))


class TestEmbedPictures:
    def test_grey_pictures_are_rgb(self, clip):
        grey = PICTURES[..., :1]
        found = (embed_pictures(clip, x, mesh=one(), batch_size=4) for x in (grey, grey.repeat(3, axis=-1)))
        np.testing.assert_array_equal(*found)

    def test_one_program_for_all_numbers_of_pictures(self, clip):
        def units(count):
            return embed_pictures(clip, PICTURES[:count], mesh=one(), batch_size=4)

        units(7)
        with jax.no_tracing():
            np.testing.assert_array_equal(units(5), units(7)[:5])


def test_no_texts(clip):
    with pytest.raises(UserError, match=r"^there are no texts to encode$"):
        embed_texts(clip, [])


class TestPrepare:
    @pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 12), (40, 31)])
    def test_is_bicubic(self, height, width):
        """Keys' kernel of a = -1/2, stretched where pictures shrink; within a level, for Pillow rounds between axes."""

        def weights(length, size):
            scale = length / size
            places = ((np.arange(size) + 0.5) * scale - 0.5)[:, None]
            x = np.abs(np.arange(length) - places) / max(scale, 1)
            near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
            kernel = np.where(x < 1, near, np.where(x < 2, far, 0))
            return kernel / kernel.sum(1, keepdims=True)

        pictures = np.random.default_rng(1).integers(60, 200, (2, height, width, 3), np.uint8)
        shorter = min(height, width)
        rows, columns = (16 * length // shorter for length in (height, width))
        resized = np.einsum("ih,jw,nhwc->nijc", weights(height, rows), weights(width, columns), pictures)
        top, left = (rows - 16) // 2, (columns - 16) // 2
        error = prepare(pictures, (16, 16, 3)) - resized[:, top : top + 16, left : left + 16]
        assert np.abs(error).max() <= 1.5

    def test_covers_a_size_that_is_not_square(self):
        """A picture of rows that are all alike has them afterwards, whatever is cut from above and below."""
        rows = np.arange(0, 240, 12, dtype=np.uint8)[None, None, :, None].repeat(30, 1)
        found = prepare(rows, (4, 10, 1))
        assert found.shape == (1, 4, 10, 1)
        assert np.abs(found[..., 0].astype(int) - (np.arange(10) * 24 + 6)).max() <= 6
        coloured = prepare(rows.repeat(3, -1), (4, 10, 1))
        np.testing.assert_array_equal(coloured, found)

    def test_leaves_pictures_of_the_size_as_they_are(self):
        square = PICTURES[:, :, 2:11]
        np.testing.assert_array_equal(prepare(square, (9, 9, 3)), square)
        np.testing.assert_array_equal(prepare(PICTURES, (9, 9, 3)), square)
