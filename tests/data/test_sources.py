import pytest
from picture_files import RED, folder, save
from refusals import sentence

from ddpm_jax.data.sources import open_source


def test_unknown_source_names_those_there_are():
    text = sentence(open_source, "fodler", height=4, width=4, channels=3)
    assert "'fodler'" in text
    assert "digits, numbers, tfds, folder, array" in text


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_channels_are_1_or_3(tmp_path, channels):
    save(tmp_path / "a.png", RED)
    assert f"data.channels is {channels}" in sentence(folder, tmp_path, channels=channels)
