"""Your own captioned pictures on a laptop's CPU: text to image at 16x16, samples after five to ten minutes.

    python main.py --config=configs/captions_small.py --workdir=runs/small --config.data.path=path/to/pictures
    python main.py --mode=sample --workdir=runs/small --prompt="a red bicycle" --guidance_scale=3

The folder has a metadata.csv or metadata.jsonl with file_name and text, or a .txt beside each picture. The recipe of
configs/numbers.py, to see whether pictures, captions and command are right before configs/captions.py is given a GPU. A
run that has ended goes on with a larger --config.train.num_steps.
"""

from configs import folder_small


def get_config():
    config = folder_small.get_config()
    config.text.update(encoder="trained", vocab_size=2048, max_length=32)
    config.model.scale_shift = True
    config.optimizer.options = {"b2": 0.99}
    config.data.flip = False  # captions may say left and right
    config.sample.update(sampler="dpmpp_2m_sde", num_steps=25)
    return config
