"""Super-resolution of numbers, from 4x8 to 8x16: the second stage of Imagen's cascade. See configs/numbers_base.py.

    python main.py --config=configs/numbers_sr.py --workdir=runs/numbers_sr
    python main.py --mode=upscale --workdir=runs/numbers_sr --input=small.png --prompt="forty-two"

The network takes the small picture, enlarged and noised, as further input channels, together with the noise level and
the number's name.
"""

from configs import numbers


def get_config():
    config = numbers.get_config()
    config.upscale.update(height=4, width=8)
    config.train.num_steps = 500
    return config
