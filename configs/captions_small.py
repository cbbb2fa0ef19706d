"""Your own captioned pictures on a laptop's CPU: text to image at 16x16 in a quarter of an hour.

    python main.py --config=configs/captions_small.py --workdir=runs/captions --config.data.path=path/to/pictures
    python main.py --mode=sample --workdir=runs/captions --prompt="a red bicycle" --guidance_scale=3

The folder has a metadata.csv or metadata.jsonl with file_name and text, or a .txt beside each picture. The network has
2.2 M parameters; use it to check your pictures, captions and the command before you run configs/captions.py on a GPU.
With 7,572 emoji the first samples came after five minutes and the run ended after 16, on two cores of a Xeon with tests
running. To train a finished run further, give a larger --config.train.num_steps.
"""

from configs import folder_small


def get_config():
    config = folder_small.get_config()
    config.text.update(encoder="trained", vocab_size=2048, max_length=32)
    config.model.scale_shift = True
    config.optimizer.options = {"b2": 0.99}
    config.data.flip = False  # captions may mention left and right
    config.sample.update(sampler="dpmpp_2m_sde", num_steps=25)
    return config
