"""Fine-tunes a run, trained here or imported, on a folder of pictures.

    python main.py --mode=import --source=path/to/stable-diffusion --workdir=runs/sd
    python main.py --config=configs/finetune.py:runs/sd --workdir=runs/mine --config.data.path=path/to/pictures

The workdir to start from follows the colon; the new run takes over its network, text encoder, autoencoder and
diffusion. If that run takes prompts, the pictures need captions. --config.lora.rank=16 trains LoRA adapters of that
rank instead of the whole network; they usually need a higher learning rate, --config.optimizer.learning_rate=1e-4. With
--config.lora.text_encoder=True the text encoder gets adapters, too, and runs in every step.
"""

from pathlib import Path

from ddpm_jax.runtime import workdir
from ddpm_jax.runtime.errors import UserError


def get_config(path: str = ""):
    if not path:
        raise UserError("configs/finetune.py needs a workdir to start from: --config=configs/finetune.py:runs/sd")
    config = workdir.read_config(path)
    dataset = workdir.read_dataset(path) or {}
    config.train.init_from = path
    config.text.encoder = dataset.get(workdir.TEXT_ENCODER, config.text.encoder)
    # A tokenizer that was trained on captions comes from train.init_from.
    if workdir.TEXT_ENCODER in dataset or config.text.tokenizer:
        config.text.tokenizer = str(Path(path) / workdir.TOKENIZER)
    config.autoencoder.source = dataset.get(workdir.AUTOENCODER, config.autoencoder.source)
    config.data.update(source="folder", path="", flip=False)
    config.optimizer.update(name="adamw", learning_rate=1e-5, decay="constant", warmup_steps=100, options={})
    config.train.update(batch_size=8, num_steps=2000, ema_decays=(0.999,))
    config.lora.update(rank=0, text_encoder=False)
    config.checkpoint.update(every_steps=500, keep=2)
    config.log.update(every_steps=20, sample_every_steps=500, sample_images=8, sample_steps=20)
    config.evaluate.every_steps = 0
    config.sample.num_images = 8
    return config
