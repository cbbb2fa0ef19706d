"""CIFAR-10 with the network of the article that this project follows: 64, 128, 256 and 1024 channels at 32, 16, 8 and 4
pixels, attention on the two coarsest levels, strided convolutions down and transposed convolutions up.

    python main.py --config=configs/cifar10_article.py --workdir=runs/cifar10_article

Otherwise the recipe is that of configs/cifar10.py. No training time and no result have been published for it.
"""

from configs import common


def get_config():
    config = common.paper_32()
    config.model.channels = 64
    config.model.channel_multipliers = (1, 2, 4, 16)
    config.model.attention_levels = (False, False, True, True)
    config.model.upsample = "transposed"
    return config
