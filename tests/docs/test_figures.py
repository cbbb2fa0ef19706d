"""The drawings of docs/figures.py are right."""

from collections import Counter

import numpy as np
import pytest
from documents import ROOT, load_script
from flax.traverse_util import flatten_dict
from PIL import Image

from configs import celebahq256, cifar10, cifar10_article, digits
from ddpm_jax import config as config_lib


@pytest.fixture(scope="module")
def figures():
    return load_script(ROOT / "docs" / "figures.py")


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        pytest.param(cifar10, 35_746_307, marks=pytest.mark.slow),
        pytest.param(celebahq256, 113_673_219, marks=pytest.mark.slow),
        pytest.param(cifar10_article, None, marks=pytest.mark.slow),
        (digits, None),
    ],
)
def test_blocks_are_the_network_s(figures, config, parameters):
    config = config.get_config()
    found = figures.unet_blocks(config)
    params = flatten_dict(config_lib.make_model(config).param_shapes())
    assert sum(block.parameters for block in found) == sum(leaf.size for leaf in params.values())
    assert parameters in (None, sum(block.parameters for block in found))
    assert {block.name for block in found} == {path[0] for path in params} | {
        block.name for block in found if block.parameters == 0
    }
    levels, blocks_a_level = len(config.model.channel_multipliers), config.model.num_res_blocks
    # conv_in, and a level's blocks and its halving, each once.
    skips = [block.skip for block in found if block.skip]
    assert len(skips) == len(set(skips)) == 1 + levels * (blocks_a_level + 1) - 1
    assert len(skips) == levels * (blocks_a_level + 1)
    by_name = {block.name: block for block in found}
    for block in found:
        if block.skip:
            assert by_name[block.skip].shape[:2] == block.shape[:2]
            assert block.channels > by_name[block.skip].shape[-1]


@pytest.mark.slow
def test_cifar10_is_the_paper_s(figures):
    found = figures.unet_blocks(cifar10.get_config())
    kinds = Counter(block.kind for block in found)
    assert (kinds["ResBlock"], kinds["AttentionBlock"]) == (4 * 2 + 2 + 4 * 3, 2 + 1 + 3)
    assert (kinds["Downsample"], kinds["Upsample"]) == (3, 3)
    attended = [block.shape for block in found if block.kind == "AttentionBlock"]
    assert attended == [(16, 16, 256)] * 2 + [(4, 4, 256)] + [(16, 16, 256)] * 3
    sizes = [block.shape[0] for block in found if block.kind == "Downsample"]
    assert sizes == [16, 8, 4]
    svg = figures.unet_svg(cifar10.get_config())
    assert (ROOT / "docs" / "images" / "unet.svg").read_text() == svg, "run python docs/figures.py"
    assert svg.count("<rect") == 1 + 4 + len(found)
    assert "35,746,307 parameters" in svg


def test_pictures_are_diffused_by_the_library(figures):
    photograph, digit = figures.pictures()
    assert (photograph.shape, digit.shape) == ((64, 64, 3), (8, 8, 1))
    assert photograph.std() > 30
    assert digit.max() > 200


@pytest.mark.slow
def test_all_are_drawn(figures, tmp_path):
    figures.main(tmp_path)
    for name in ("forward.png", "schedules.png"):
        drawn, committed = Image.open(tmp_path / name), Image.open(ROOT / "docs" / "images" / name)
        assert drawn.size == committed.size
        drawn, committed = (np.asarray(image.convert("RGB"), float) for image in (drawn, committed))
        assert np.abs(drawn - committed).mean() < 3  # fonts differ by matplotlib's version
