"""Handwritten numbers from their names at a quarter of the pixels, 4x8 grey: the first stage of Imagen's cascade.

    python main.py --config=configs/numbers_base.py --workdir=runs/numbers_base
    python main.py --config=configs/numbers_sr.py --workdir=runs/numbers_sr
    python main.py --mode=compose --stages=runs/numbers_base,runs/numbers_sr --workdir=runs/numbers_cascade
    python main.py --mode=sample --workdir=runs/numbers_cascade --prompt="forty-two" --guidance_scale=2

The second run enlarges what the first draws; the third command combines both into a pipeline.
"""

from configs import numbers


def get_config():
    config = numbers.get_config()
    config.data.update(height=4, width=8)
    config.model.update(attention_resolutions=(8, 4))
    return config
