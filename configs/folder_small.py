"""Your own pictures on a laptop's CPU, at 16x16: first samples after five to ten minutes, the end after 15 to 25.

    python main.py --config=configs/folder_small.py --workdir=runs/small --config.data.path=path/to/pictures

A network of 1.7 M parameters with the digits' recipe; use it to check your pictures and the command before you run
configs/folder.py on a GPU. Trained on 4,000 emoji, half of its samples were recognisable. To train a finished run
further, give a larger --config.train.num_steps.
"""

from configs import digits, folder


def get_config():
    config = digits.get_config()
    config.data = folder.get_config().data
    config.data.update(height=16, width=16)
    config.model.update(channels=32, channel_multipliers=(1, 2, 3), attention_resolutions=(8,))
    config.train.update(batch_size=32, num_steps=2000)
    config.optimizer.update(learning_rate=1e-3, decay="constant")
    return config
