"""The paper's LSUN Cat experiment at 256x256: 113.7 M parameters, 1,800,000 steps of 64 images.

    python main.py --config=configs/lsun_cat.py --workdir=runs/lsun_cat

tensorflow-datasets downloads and prepares the images; a folder of them works, too: --config.data.source=folder
--config.data.path=... At the 2.2 steps/s that the paper reports for a TPU v3-8 this takes 227 hours; the paper's FID is
19.75. This project has not repeated the run.
"""

from configs import common


def get_config():
    config = common.paper_256()
    config.data.name = "lsun/cat"
    config.train.num_steps = 1_800_000
    return config
