import numpy as np

from ddpm_jax.data.sources import open_source
from ddpm_jax.data.spread import spread, spread_captions


def test_examples_are_evenly_spread(tmp_path):
    images = np.arange(11, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    captions = np.array([[f"first of {i}", f"second of {i}"] for i in range(11)])
    np.savez(tmp_path / "x.npz", image=images, caption=captions)
    source = open_source("array", height=4, width=4, channels=1, path=str(tmp_path / "x.npz"), captions=True)
    batch = spread(source, 3)
    assert batch["index"].tolist() == batch["image"][:, 0, 0, 0].tolist() == [0, 5, 10]
    assert spread_captions(source, 3) == ["first of 0", "first of 5", "first of 10"]
    assert spread(source, 99)["index"].tolist() == list(range(11))
