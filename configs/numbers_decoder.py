"""DALL-E 2's decoder for handwritten numbers: from CLIP's embedding of a picture to a picture. See numbers_prior.py.

    python main.py --config=configs/numbers_decoder.py --workdir=runs/numbers_decoder
    python main.py --mode=variations --workdir=runs/numbers_decoder --input=data:36
    python main.py --mode=blend --workdir=runs/numbers_decoder --input=data:36,data:17

The embedding becomes four tokens beside those of the text, and is added to the time embedding. It is dropped from a
tenth of the training examples, and the text from half of them.
"""

from configs import numbers


def get_config():
    config = numbers.get_config()
    config.text.update(encoder="runs/numbers_clip", dropout=0.5)
    config.embedding.clip = "runs/numbers_clip"
    return config
