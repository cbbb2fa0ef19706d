"""The paper's LSUN Church experiment at 256x256: 113.7 M parameters, 1,200,000 steps of 64 images.

    python main.py --config=configs/lsun_church.py --workdir=runs/lsun_church

tensorflow-datasets downloads and prepares the images; a folder of them works, too: --config.data.source=folder
--config.data.path=... At the 2.2 steps/s that the paper reports for a TPU v3-8 this takes 152 hours; the paper's FID is
7.89. This project has not repeated the run.
"""

from configs import common


def get_config():
    config = common.paper_256()
    config.data.name = "lsun/church_outdoor"
    config.train.num_steps = 1_200_000
    return config
