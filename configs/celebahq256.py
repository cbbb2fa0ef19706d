"""The paper's CelebA-HQ experiment at 256x256: 113.7 M parameters, 500,000 steps of 64 images.

    python main.py --config=configs/celebahq256.py --workdir=runs/celebahq256

tensorflow-datasets cannot download CelebA-HQ; its page on celeb_a_hq explains how to make the files. A folder of the
images works, too: --config.data.source=folder --config.data.path=... The paper ran at 2.2 steps/s on a TPU v3-8 (63
hours); this project has not repeated the run.
"""

from configs import common


def get_config():
    config = common.paper_256()
    config.data.name = "celeb_a_hq/256"
    config.train.num_steps = 500_000
    return config
