"""CLIP's contrastive training: the loss, and runs whose text encoder other runs use."""

import json
import shutil

import clips
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from PIL import Image
from runs import assert_same_checkpoint, checkpoint, metrics

import ddpm_jax
from ddpm_jax import config as config_lib
from ddpm_jax.interop import transformers as interop
from ddpm_jax.interop import workdirs
from ddpm_jax.models.clip import CLIPImageEncoder, CLIPTextEncoder
from ddpm_jax.runtime import parallel, workdir
from ddpm_jax.runtime.errors import UserError
from ddpm_jax.sampling.captions import CaptionCondition
from ddpm_jax.sampling.clip import embed_pictures, embed_texts
from ddpm_jax.sampling.decoder import Pixels
from ddpm_jax.text.encoders import TrainedTexts
from ddpm_jax.text.tokenizers import Tokenizer
from ddpm_jax.training.clips import load_clip
from ddpm_jax.training.objectives import Contrastive, clipped, contrastive_losses
from ddpm_jax.training.state import create_state
from ddpm_jax.training.step import Metrics, make_train_step
from ddpm_jax.training.texts import text_description
from ddpm_jax.validation import validate

CAPTIONS = ("a red apple", "two green pears", "a plum", "plums")
STEPS = 6
RNG = np.random.default_rng(0)


# The loss.


def in_float64(pictures, texts, scale, captions):
    """The definition, pair by pair."""
    pictures, texts = (x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True) for x in (pictures, texts))
    logits = scale * pictures @ texts.T
    total = 0.0
    for table in (logits, logits.T):
        for i, row in enumerate(table):
            right = [j for j, caption in enumerate(captions) if caption == captions[i]]
            total -= np.mean(row[right]) - np.log(np.sum(np.exp(row)))
    return total / (2 * len(captions))


@pytest.mark.parametrize("captions", ["abcdefg", "abcabca", "aaaaaaa"])
def test_the_loss_is_the_symmetric_cross_entropy(captions):
    pictures, texts = RNG.standard_normal((2, 7, 5)).astype(np.float32)
    equal = np.array([[a == b for a in captions] for b in captions])
    losses = contrastive_losses(pictures, texts, jnp.log(20.0), equal)
    assert losses.shape == (7,)
    np.testing.assert_allclose(np.mean(losses), in_float64(pictures, texts, 20, captions), rtol=1e-5)


def test_equal_captions_are_right_for_one_another():
    """Embeddings that distinguish all captions reach the minimal loss, the entropy of the targets."""
    units = np.eye(3, dtype=np.float32)[[0, 1, 0, 2]]
    losses = contrastive_losses(units, units, jnp.log(100.0), units @ units.T > 0)
    np.testing.assert_allclose(losses, [np.log(2), 0, np.log(2), 0], atol=1e-5)


def test_the_temperature_is_clipped():
    value, slope = jax.value_and_grad(clipped)(4.0)
    assert (value, slope) == (4.0, 1.0)
    most = np.float32(np.log(100))
    assert clipped(5.0) == most
    assert jax.grad(lambda x: clipped(x))(5.0) == 1.0  # a step against it leads back
    assert jax.grad(lambda x: -clipped(x))(5.0) == 0.0


def objective(flip=False):
    tokenizer = Tokenizer.train(CAPTIONS, 280, 8, end_last=True)
    options = {"width": 16, "num_layers": 1, "num_heads": 2, "mlp_width": 32, "projection": 6}
    text = CLIPTextEncoder(280, max_length=8, end_token=tokenizer.end_id, **options)
    image = CLIPImageEncoder((4, 8), patch_size=2, channels=1, **options)
    condition = CaptionCondition(TrainedTexts(tokenizer, text), 0.1, CAPTIONS)
    return Contrastive(text, image, condition, Pixels((4, 8, 1), flip))


def start(clip):
    """Parameters that distinguish pictures, unlike those of a new CLIP."""
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32), clip.init_params(0))


def trained(num_devices, steps=2):
    """The state after some steps on this many devices, and the mean of the first losses."""
    clip, mesh = objective(flip=True), Mesh(np.array(jax.devices()[:num_devices]).reshape(-1, 1), ("data", "fsdp"))
    optimizer = optax.sgd(0.1)  # of Adam's first steps, a gradient of nearly 0 has any sign

    def create():
        return create_state(start(clip), optimizer, (0.9,)), Metrics.zero()

    shardings = parallel.state_shardings(mesh, jax.eval_shape(create))
    state, sums = jax.jit(create, out_shardings=shardings, compiler_options=parallel.run_once_options())()
    step, rng = make_train_step(clip, optimizer, mesh, seed=0), np.random.default_rng(1)
    ids = clip.condition.texts.tokenizer.encode([CAPTIONS[i % 4] for i in range(16)]).ids
    for _ in range(steps):
        batch = {"image": rng.integers(0, 256, (16, 4, 8, 1), np.uint8), "ids": ids}
        placed = {name: parallel.place(value, parallel.batch_sharding(mesh)) for name, value in batch.items()}
        if not isinstance(step, jax.stages.Compiled):
            step = step.lower(state, sums, placed).compile(compiler_options=parallel.run_once_options())
        state, sums = step(state, sums, placed)
    return jax.device_get(state.params), float(sums.loss)


@pytest.mark.eight
@pytest.mark.slow
def test_eight_devices_give_the_loss_of_one():
    (one, loss_of_one), (eight, loss_of_eight) = trained(1), trained(8)
    np.testing.assert_allclose(loss_of_eight, loss_of_one, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), eight, one)
    moved = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), one, start(objective()))
    assert moved["image"]["patches"]["kernel"] > 1e-3
    assert moved["text"]["tokens"]["embedding"] > 1e-3


@pytest.mark.peers
def test_the_loss_is_that_of_transformers(measure, tmp_path):
    """For the same weights and a batch of captions that all differ."""
    why = "transformers and PyTorch are not installed (pip install -e '.[peers]')"
    torch = pytest.importorskip("torch", reason=why)
    transformers = pytest.importorskip("transformers", reason=why)
    ours = clips.make_clip(tmp_path / "tokenizer")
    theirs = transformers.CLIPModel.from_pretrained(interop.write_clip(tmp_path / "clip", ours)).eval()
    pictures = RNG.standard_normal((4, 12, 12, 3)).astype(np.float32)
    ids = ours.tokenizer.encode(CAPTIONS).ids
    with torch.no_grad():
        pixels = torch.tensor(pictures.transpose(0, 3, 1, 2))
        expected = float(theirs(input_ids=torch.tensor(ids), pixel_values=pixels, return_loss=True).loss)
    condition = CaptionCondition(TrainedTexts(ours.tokenizer, ours.text))
    clip = Contrastive(ours.text, ours.image, condition, Pixels((12, 12, 3)))
    params = {**ours.params, "logit_scale": jnp.float32(ours.logit_scale)}
    losses = clip.losses(params, None, {"x": pictures, "ids": ids}, jax.random.key(0))
    error = abs(float(jnp.mean(losses)) - expected) / expected
    measure("contrastive loss, narrow CLIP", "transformers, PyTorch", error, 1e-5, "relative")


# What is refused before anything is compiled.


def tiny_config(**sections):
    """A CLIP of six steps; sections: further fields."""
    config = config_lib.default_config()
    config.data.update(source="array", height=4, width=8, channels=1)
    config.text.update(encoder="trained", vocab_size=280, max_length=12, width=16, num_layers=1, num_heads=2)
    config.clip.update(patch_size=2, width=16, num_layers=1, num_heads=2, projection=6)
    config.optimizer.update(learning_rate=1e-2, warmup_steps=0)
    config.train.update(objective="clip", batch_size=8, num_steps=STEPS, ema_decays=(0.99,))
    config.log.update(every_steps=3, sample_every_steps=3, sample_images=4, tensorboard=False)
    config.evaluate.update(every_steps=3, num_images=8)
    config.checkpoint.every_steps = 3
    config.sample.num_images = 4
    for section, fields in sections.items():
        config[section].update(fields)
    return config


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"text": {"encoder": ""}}, "config.text.encoder is '', but a CLIP trains its own text encoder"),
        ({"text": {"num_layers": 0}}, "config.text.num_layers is 0, which leaves the state at the end of a text"),
        ({"train": {"accumulation": 2}}, "config.train.accumulation is 2, but a CLIP's loss is computed over"),
        ({"train": {"batch_size": 1}}, "config.train.batch_size is 1, but a CLIP learns by telling"),
        ({"evaluate": {"num_images": 0}}, "config.evaluate.num_images is 0, but a CLIP is evaluated on pictures"),
        ({"upscale": {"height": 2, "width": 4}}, "config.upscale.height is 2, but a CLIP is trained on pictures"),
        ({"lora": {"rank": 2}}, "config.lora.rank is 2; accepted for a CLIP: 0"),
        ({"clip": {"patch_size": 3}}, "config: patch_size 3 does not divide image_size (4, 8)"),
        ({"clip": {"num_heads": 3}}, "num_heads"),
        ({"clip": {"projection": 0}}, "config.clip.projection is 0; at least 1 is needed"),
    ],
)
def test_refused(sections, said):
    config = tiny_config(**sections)
    with pytest.raises(UserError) as caught:
        validate(config, num_devices=1)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_clip_is_valid():
    validate(tiny_config(), num_devices=8)


def test_a_tokenizer_whose_end_transformers_would_not_find(tmp_path):
    """Its end token is 2, which in transformers means the largest id."""
    path = tmp_path / "tokenizer.json"
    path.write_text(Tokenizer.train(CAPTIONS, 280, 12).to_json())
    config = tiny_config(text={"tokenizer": str(path)})
    with pytest.raises(UserError, match="ends texts with the token 2, by which transformers means the largest one"):
        validate(config, num_devices=1)
    path.write_text(Tokenizer.train(CAPTIONS, 280, 12, end_last=True).to_json())
    validate(config, num_devices=1)


# Runs.


def make(folder):
    """The workdirs "clip" (4x8 grey) and "square" (4x4 RGB), and their training pictures."""
    rng = np.random.default_rng(0)
    for name, shape in (("clip", (4, 8)), ("square", (4, 4, 3))):
        path = str(folder / f"{name}.npz")
        np.savez(path, image=rng.integers(0, 256, (16, *shape), np.uint8), caption=[*CAPTIONS] * 4)
        height, width, channels = (*shape, 1)[:3]
        data = {"path": path, "height": height, "width": width, "channels": channels}
        ddpm_jax.train(tiny_config(data=data), folder / name)


@pytest.fixture(scope="module")
def runs(made_once):
    return made_once(make)


@pytest.mark.slow
def test_a_run_leaves_what_others_do(runs):
    run = runs / "clip"
    lines = metrics(run)
    assert [line["step"] for line in lines if "loss" in line] == [3, 6]
    assert [line["step"] for line in lines if "retrieval_data" in line] == [3, 6]
    assert Image.open(run / "samples" / "final.png").mode == "RGB"
    assert {path.name for path in (run / "samples").iterdir()} == {"data.png", "final.png", "step_00000003.png"}
    assert (run / "report.html").is_file()


@pytest.mark.slow
def test_it_resumes_bit_for_bit(runs, tmp_path):
    again = shutil.copytree(runs / "clip", tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / str(STEPS))
    ddpm_jax.train(workdir.read_config(again), again)
    assert_same_checkpoint(again, runs / "clip", STEPS)


@pytest.mark.slow
def test_load_clip(runs, tmp_path):
    clip = ddpm_jax.load_clip(runs / "clip")
    averaged = checkpoint(runs / "clip", STEPS)["ema_0.99"]
    for half in ("text", "image"):
        jax.tree.map(np.testing.assert_array_equal, clip.params[half], averaged[half])
    assert clip.logit_scale == averaged["logit_scale"]
    pictures = np.load(runs / "clip.npz")["image"][..., None]
    units = embed_pictures(clip, pictures)
    found = clip.image.apply({"params": clip.params["image"]}, pictures / np.float32(127.5) - 1).projected
    np.testing.assert_allclose(units, found / np.linalg.norm(found, axis=1, keepdims=True), atol=1e-5)
    assert embed_texts(clip, CAPTIONS).shape == (4, 6)
    # What the project writes for itself is read back, though transformers has no such CLIP.
    again = load_clip(interop.write_clip(tmp_path / "written", clip))
    assert (again.text, again.image) == (clip.text, clip.image)
    np.testing.assert_array_equal(embed_pictures(again, pictures), units)
    with pytest.raises(UserError, match="is for pictures of 4x8, which are not square; accepted for transformers"):
        workdirs.export_clip(runs / "clip", tmp_path / "out")


@pytest.mark.slow
def test_a_run_takes_over_the_text_encoder(runs, tmp_path):
    """With its tokenizer, so it no longer needs the CLIP's workdir."""
    config = tiny_config(train={"objective": "diffusion", "num_steps": 2}, data={"path": str(runs / "clip.npz")})
    config.text.encoder = str(shutil.copytree(runs / "clip", tmp_path / "clip"))
    config.model.update(channels=8, num_groups=4, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=())
    config.diffusion.num_timesteps = 50
    config.evaluate.every_steps = config.log.sample_every_steps = 0
    config.sample.update(num_images=2, num_steps=2)
    ddpm_jax.train(config, tmp_path / "run")
    clip = load_clip(runs / "clip")
    net, params = interop.read(tmp_path / "run" / workdir.TEXT_ENCODER)
    assert net == clip.text
    jax.tree.map(np.testing.assert_array_equal, params, clip.params["text"])
    assert (tmp_path / "run" / "tokenizer.json").read_text() == (runs / "clip" / "tokenizer.json").read_text()
    shutil.rmtree(tmp_path / "clip")
    run = ddpm_jax.load(tmp_path / "run")
    assert run.sample(1, prompts=["a plum"]).shape == (1, 4, 8, 1)
    rows = run.condition.texts.arrays(["a plum"])["vector"]
    unit = rows / np.linalg.norm(rows)
    np.testing.assert_allclose(unit, embed_texts(clip, ["a plum"]), atol=1e-5)


@pytest.mark.slow
@pytest.mark.peers
def test_export(runs, tmp_path):
    transformers = pytest.importorskip("transformers", reason="it is not installed (pip install -e '.[peers]')")
    torch = pytest.importorskip("torch", reason="it is not installed (pip install -e '.[peers]')")
    clip = load_clip(runs / "square")
    out = workdirs.export_clip(runs / "square", tmp_path / "out")
    theirs = transformers.CLIPModel.from_pretrained(out).eval()
    pictures = np.load(runs / "square.npz")["image"]
    pixels = torch.tensor((pictures / np.float32(127.5) - 1).transpose(0, 3, 1, 2))
    with torch.no_grad():
        ids = torch.tensor(clip.tokenizer.encode(CAPTIONS).ids)
        logits = theirs(input_ids=ids, pixel_values=pixels).logits_per_image.numpy()
    ours = np.exp(clip.logit_scale) * embed_pictures(clip, pictures) @ embed_texts(clip, CAPTIONS).T
    np.testing.assert_allclose(ours, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_commands(runs, call, tmp_path):
    run = shutil.copytree(runs / "clip", tmp_path / "run")
    status, output = call("--mode=evaluate", f"--workdir={run}", config=None)
    assert status == 0, output
    assert "caption first, data" in output
    assert json.loads((run / "evaluation.json").read_text())[0]["images"] == 16
    for flags, said in (
        (("--mode=sample",), "holds a CLIP, which makes no pictures; accepted: a run that uses it as"),
        (("--mode=evaluate", "--features=digits"), "--features does nothing with --mode=evaluate of a CLIP"),
        (("--mode=export", f"--out={tmp_path / 'out'}"), "is for pictures of 4x8, which are not square"),
    ):
        status, output = call(*flags, f"--workdir={run}", config=None)
        assert status == 1
        assert said in output


@pytest.fixture
def described(tmp_path):
    """Workdirs of all kinds of runs that have started, without checkpoints."""
    for name in config_lib.OBJECTIVES:
        config = tiny_config(train={"objective": name})
        (tmp_path / name).mkdir()
        tokenizer = Tokenizer.train(CAPTIONS, 280, 12, end_last=True).to_json()
        workdir.record(tmp_path / name, config, {"fingerprint": "x", "class_names": None, "tokenizer": tokenizer})
    return tmp_path


def test_of_other_runs(described):
    with pytest.raises(UserError, match=r"is a run with train\.objective 'autoencoder'"):
        load_clip(described / "autoencoder")
    with pytest.raises(UserError, match="no checkpoint"):
        load_clip(described / "clip")
    with pytest.raises(UserError, match="holds a CLIP, which makes no pictures"):
        ddpm_jax.load(described / "clip")
    config = tiny_config(train={"objective": "diffusion"}, text={"encoder": str(described / "diffusion")})
    with pytest.raises(UserError, match=r"text\.encoder .* is a run with train\.objective 'diffusion'"):
        text_description(config, None, described, {"shown_captions": [""]})
