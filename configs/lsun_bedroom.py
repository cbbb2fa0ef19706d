"""The paper's LSUN Bedroom experiment at 256x256: 113.7 M parameters, 2,400,000 steps of 64 images.

    python main.py --config=configs/lsun_bedroom.py --workdir=runs/lsun_bedroom

tensorflow-datasets downloads and prepares the images; a folder of them works, too: --config.data.source=folder
--config.data.path=... At the 2.2 steps/s that the paper reports for a TPU v3-8 this takes 303 hours; the paper's FID is
6.36. This project has not repeated the run.

No flips: according to the paper's appendix B, Bedroom is the only set trained without them.
"""

from configs import common


def get_config():
    config = common.paper_256()
    config.data.name = "lsun/bedroom"
    config.data.flip = False
    config.train.num_steps = 2_400_000
    return config
