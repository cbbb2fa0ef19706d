"""scikit-learn's handwritten digits, 8x8 grey: a whole run in one to five minutes on two cores.

    python main.py --config=configs/digits.py --workdir=runs/digits

The network has 0.7 M parameters. Several choices make so short a run possible: v-prediction on a cosine schedule, a
loss weighted by min-SNR, t stratified over the batch, a high learning rate that decays to zero, and a fast moving
average. A classifier recognises 83 to 89 % of the samples as digits (benchmarks/digits_quality.py).
"""

from configs import common


def get_config():
    config = common.paper_32()
    config.data.update(source="digits", height=8, width=8, channels=1, flip=False)
    config.model.update(
        channels=32, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,), dropout=0.0
    )
    config.diffusion.update(schedule="cosine", prediction="v", weighting="min_snr", timestep_sampler="stratified")
    config.optimizer.update(learning_rate=2e-3, decay="cosine", warmup_steps=100)
    config.train.update(batch_size=64, num_steps=1200, ema_decays=(0.99,))
    config.log.update(every_steps=50, sample_every_steps=500, sample_images=16, sample_steps=50)
    config.checkpoint.every_steps = 500
    config.sample.update(num_images=64, batch_size=64)
    return config
