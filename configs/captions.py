"""Your own captioned pictures: text to image at 64x64, on a GPU.

    python main.py --config=configs/captions.py --workdir=runs/mine --config.data.path=path/to/pictures
    python main.py --mode=sample --workdir=runs/mine --prompt="a red bicycle" --guidance_scale=3

The folder has a metadata.csv or metadata.jsonl with file_name and text, or a .txt beside each picture. The network has
28.1 M parameters, including a text encoder that is trained along with it. A frozen CLIP knows more words than your
captions contain: --config.text.encoder=path/to/clip names a transformers folder, such as Stable Diffusion's
text_encoder, and --config.text.tokenizer that of its tokenizer. This project has not trained it to the end.
"""

from configs import folder


def get_config():
    config = folder.get_config()
    config.text.update(encoder="trained", vocab_size=8192, max_length=64, width=256, num_layers=4, num_heads=4)
    config.model.attention_resolutions = (16, 8)
    config.data.flip = False  # captions may mention left and right
    return config
