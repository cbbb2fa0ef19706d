"""The paper's CIFAR-10 experiment: 35.7 M parameters, 800,000 steps of 128 images.

    python main.py --config=configs/cifar10.py --workdir=runs/cifar10

tensorflow-datasets downloads and prepares the data set at the first start. The paper took 10.6 hours on a TPU v3-8 (21
steps/s) and reports FID 3.17 and an Inception Score of 9.46 on 50,000 samples; this project has not repeated that run.
On an accelerator with bfloat16 units, add --config.model.dtype=bfloat16.
"""

from configs import common


def get_config():
    return common.paper_32()
