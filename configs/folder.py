"""Your own pictures: every png, jpg, webp or bmp under a folder, at 64x64.

    python main.py --config=configs/folder.py --workdir=runs/mine --config.data.path=path/to/pictures

Images are scaled to cover the size and cropped at the centre. The network has 20.1 M parameters; a few thousand
pictures need a GPU for a few hours. Settings that you may want to change: the size (--config.data.height,
--config.data.width; divisible by 8), --config.data.channels=1 for grey, --config.data.flip=False where left and right
differ, --config.model.channels. This project has not trained it to the end.
"""

from configs import common


def get_config():
    config = common.paper_32()
    config.data.update(source="folder", height=64, width=64)
    config.model.update(channels=96, channel_multipliers=(1, 2, 2, 2), attention_resolutions=(16,))
    config.diffusion.schedule = "cosine"
    config.train.update(batch_size=64, num_steps=200_000)
    config.optimizer.warmup_steps = 1000
    config.log.sample_every_steps = 2500
    config.checkpoint.every_steps = 2500
    return config
