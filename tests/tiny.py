"""A small config, a tiny run of random weights, and pictures for it."""

import jax
import numpy as np
from jax.sharding import Mesh

from ddpm_jax import config as config_lib
from ddpm_jax.run import Run
from ddpm_jax.runtime import parallel
from ddpm_jax.text.tokenizers import Tokenizer
from ddpm_jax.validation import validate

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (3, 8, 8, 1), np.uint8)
QUICK = {"num_steps": 4}
CAPTIONS = ("a red apple", "two green pears", "a plum")


def small(**changes):
    """A config whose network is traced quickly, with fields set as {"section__field": value}, whatever their type."""
    config = config_lib.default_config()
    config.data.update(height=8, width=8)
    config.model.update(channels=32, channel_multipliers=(1, 2), num_res_blocks=1, attention_resolutions=(4,))
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        place = config[section] if section else config
        with config.unlocked():
            if field in place:
                del place[field]  # else the value would be converted to the type of the old one
            place[field] = value
    return config


def make_run(devices=8, class_conditional=False, label_dropout=0.0, captions=(), **sample):
    config = config_lib.default_config()
    config.data.update(source="digits", height=8, width=8, channels=1, flip=False)
    config.model.update(channels=8, num_groups=4, channel_multipliers=(1,), num_res_blocks=1, middle_attention=False)
    config.model.class_conditional = class_conditional
    config.train.label_dropout = label_dropout
    if captions:
        config.data.update(source="numbers", num_digits=1)
        config.model.middle_attention = True  # which reads them
        config.text.update(encoder="trained", vocab_size=280, max_length=12, width=16, num_layers=1, num_heads=2)
    config.diffusion.num_timesteps = 40
    config.log.sample_steps = 0
    config.sample.update(batch_size=16, **sample)
    validate(config)
    names = [str(i) for i in range(3)]
    dataset = {"source": "digits", "class_names": names, "num_images": 1797, "shape": [8, 8, 1], "fingerprint": "x"}
    if captions:
        tokenizer = Tokenizer.train(captions, config.text.vocab_size, config.text.max_length)
        dataset |= {"tokenizer": tokenizer.to_json(), "shown_captions": list(captions)}
    model = config_lib.make_model(config, dataset)
    init = jax.jit(lambda: model.init_params(0), compiler_options=parallel.run_once_options())
    # Its last layer starts at zero: without this the output would be zero.
    params = jax.tree.map(lambda p: p + 0.1 * np.cos(np.arange(p.size)).reshape(p.shape), init())
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    params = jax.device_put(params, parallel.replicated(mesh))
    return Run(config, dataset, 3, 0.99, model, params, mesh)


def of_classes(number):
    """The description of a data set with this many classes."""
    return {"class_names": [str(i) for i in range(number)]}


def near(a, b):
    """Equal to within one grey level."""
    return a.shape == b.shape and np.max(np.abs(a.astype(int) - b)) <= 1
