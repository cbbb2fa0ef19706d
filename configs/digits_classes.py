"""The digits by class, with label dropout for classifier-free guidance; otherwise as configs/digits.py.

    python main.py --config=configs/digits_classes.py --workdir=runs/classes
    python main.py --mode=sample --workdir=runs/classes --classes=0,1,2,3,4,5,6,7,8,9 --guidance_scale=2

It takes as long as configs/digits.py. The second command draws one row per class.
"""

from configs import digits


def get_config():
    config = digits.get_config()
    config.model.class_conditional = True
    config.train.label_dropout = 0.15
    return config
