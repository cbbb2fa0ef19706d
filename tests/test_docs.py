"""The documentation: commands and code run, links lead somewhere, the site and its figures are right."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections import Counter

import numpy as np
import pytest
import stable_diffusions
import unclips
from documents import PAGES, ROOT, anchors, blocks, commands, links
from filelock import FileLock
from flax.traverse_util import flatten_dict
from PIL import Image
from runs import PATIENCE, free_port
from xla import xla_flags

from configs import celebahq256, cifar10, cifar10_article, digits
from ddpm_jax import config as config_lib
from ddpm_jax.diffusion import tables

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PYPROJECT["urls"]["Repository"]

# Indented blocks that show what a program printed, by how they begin.
OUTPUT = {
    "docs/tpu.md": (
        "35,746,307 parameters, bfloat16, remat none, batch 128, on v5e:2x4",
        "255,677,955 parameters, bfloat16, remat none, batch 64, on v5e:2x4",
        "network call of sampling 256 images",
        "features of 64 images by Inception",
        "35,746,307 parameters, bfloat16, remat none, batch 128, on 1 x NVIDIA H200",
    ),
    "docs/playground.md": ('{"state": "compiling"}',),
}

# Commands that are not run as they stand, and why. {flag as documented: (flags in its place, reason)}; a "*" stands for
# any value.
REPLACED = {
    "--config=...": (["--config=configs/digits.py"], "an ellipsis"),
    "--workdir=...": (["--workdir=runs/elsewhere"], "an ellipsis"),
    "--workdir=/mnt/shared/cifar10": (["--workdir=runs/shared"], "a folder that is not here"),
    "--config.data.data_dir=/mnt/shared/tensorflow_datasets": ([], "a folder that is not here"),
    "--config.data.source=tfds": (["--config.data.source=digits"], "would download"),
    "--source=google/ddpm-cifar10-32": (["--source=a-diffusers-folder"], "would download; the folder is of an export"),
    "--features=inception": (["--features=digits"], "its weights would be downloaded"),
    "--topology=v5e:2x4": ([], "wants libtpu, and minutes; measures here in its place"),
    "--coordinator=host0:1234": (["--coordinator=127.0.0.1:PORT"], "no such host"),
    "--num_processes=2": (["--num_processes=1"], "tests/test_processes.py has jobs of two"),
    "--source=stable-diffusion-v1-5/stable-diffusion-v1-5": (["--source=stable-diffusion"], "would download"),
    "--source=stable-diffusion-v1-5/stable-diffusion-inpainting": (
        ["--source=stable-diffusion-inpainting"],
        "would download",
    ),
    **{f"--source={name}": ([f"--source={folder}"], "would download") for name, folder in unclips.HUB.items()},
    "--height=512": (["--height=64"], "seconds more"),
    "--width=768": (["--width=80"], "seconds more"),
    "--images=0-49999": (["--images=0-15", "--shard_size=4"], "hours"),
    "--num_images=*": (["--num_images=24"], "minutes to hours"),
    "--likelihood_images=*": (["--likelihood_images=2"], "minutes"),
}
# What every run gets that a command does not set itself: a network and a training of a second, on grey 8x8 pictures.
TINY = {
    "data.height": "8",
    "data.width": "8",
    "data.channels": "1",
    "data.flip": "False",
    "model.channels": "8",
    "model.num_groups": "4",
    "model.channel_multipliers": "(1,)",
    "model.num_res_blocks": "1",
    "model.attention_resolutions": "()",
    "model.middle_attention": "False",
    "model.dropout": "0.0",
    "text.width": "16",
    "text.num_layers": "1",
    "text.num_heads": "2",
    "clip.width": "16",
    "clip.num_layers": "1",
    "clip.num_heads": "2",
    "clip.projection": "16",
    "prior.width": "16",
    "prior.num_layers": "1",
    "prior.num_heads": "2",
    "embedding.token_width": "16",
    "autoencoder.level_channels": "(8,8)",
    "train.num_steps": "4",
    "train.batch_size": "8",
    "log.every_steps": "2",
    "log.sample_every_steps": "0",
    "log.sample_steps": "4",
    "checkpoint.every_steps": "4",
    "sample.num_images": "4",
    "sample.num_steps": "4",
    "sample.batch_size": "8",
}
# What a mode gets that a command does not set itself, for the same reason.
FEW = {
    "evaluate": ["--num_images=24", "--likelihood_images=2"],
    "neighbours": ["--num_images=4"],
    "sample": ["--num_steps=4"],
    "plan": ["--programs=sample"],
}
PLAIN_TRAINING = re.compile(
    r"python main\.py --config=configs/(?P<config>numbers\w*|digits\w*)\.py --workdir=(?P<workdir>\S+)"
)
OF_A_CASCADE = ("configs/numbers_base.py", "configs/numbers_sr.py")  # whose sizes follow from each other
# Modes whose results no command after them needs.
LEAVES_NOTHING = (
    *("sample", "interpolate", "vary", "denoise", "inpaint", "progressive", "coarse_to_fine", "neighbours", "evaluate"),
    *("upscale", "variations", "blend", "text_difference"),
    *("prepare", "doctor", "plan", "report"),
)
FROM_NETWORK = ("cifar10", "celebahq256", "lsun")  # configs whose images would be downloaded: digits in their place
# Commands of other kinds that are not run here.
ELSEWHERE = {
    ("mkdocs", "build", "--strict"): "test_site",
    ("python", "docs/figures.py"): "test_figures",
    ("python", "-m", "pytest", "-m", "peers"): ".ci/run",
    ("ruff", "check", "."): ".ci/run",
    ("ruff", "format", "--check", "."): ".ci/run",
    ("mypy",): ".ci/run",
    ("python3", "-m", "venv", ".venv"): "the test's own Python",
    (".", ".venv/bin/activate"): "the test's own Python",
    ("cd", "ddpm_jax"): "the workspace",
    ("ssh", "-L", "8000:127.0.0.1:8000", "machine"): "another machine",
    **{
        ("python", "main.py", *flags): "tests/training/test_latent_runs.py"
        for flags in (
            ("--config=configs/finetune.py:runs/sd15", "--workdir=runs/mine", "--config.data.path=path/to/pictures"),
            (
                *("--config=configs/finetune.py:runs/sd15", "--workdir=runs/mine_lora"),
                *("--config.data.path=path/to/pictures", "--config.lora.rank=16"),
            ),
        )
    },
    **{
        (
            *("python", "main.py", "--mode=plan", "--config=configs/finetune.py:runs/sd15", "--topology=v5e:2x4"),
            *flags,
        ): "half an hour of a TPU's compiler each; tests/planning/test_programs.py"
        for flags in (
            (
                *("--config.model.dtype=bfloat16", "--programs=sample", "--config.sample.sampler=dpmpp_2m"),
                *("--config.sample.num_steps=25", "--config.sample.batch_size=8"),
            ),
            ("--dtype=bfloat16", "--programs=decode", "--config.sample.batch_size=8"),
            ("--config.model.dtype=bfloat16", "--programs=train", "--config.lora.rank=16"),
            ("--config.model.dtype=bfloat16", "--programs=train", "--config.mesh.data=1", "--config.mesh.fsdp=-1"),
        )
    },
    **{
        ("python", "main.py", *flags): "tests/interop/test_stable_diffusion.py"
        for flags in (
            (
                *("--mode=import", "--source=model-768.ckpt", "--tokenizer=path/to/tokenizer", "--prediction=v"),
                "--workdir=runs/sd21",
            ),
            (
                *("--mode=sample", "--workdir=runs/sd15", "--prompt=a castle"),
                *("--lora=style.safetensors:0.7", "--lora=ink.safetensors:0.3"),
            ),
            ("--mode=export", "--workdir=runs/mine_lora", "--adapters", "--out=mine.safetensors"),
            ("--mode=export", "--workdir=runs/numbers_autoencoder", "--out=autoencoder-diffusers"),
        )
    },
}
INSTALLED_BY_NAME = ("torch-fidelity",)  # pip install --no-deps: its needs would replace what is installed


@pytest.fixture(scope="module")
def done(shared):
    """A folder for what one page leaves to the others, whichever worker has it: runs, and which commands were run."""
    folder = shared / "documents"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory, data_dir):
    """The environment of a page's commands, with caches of its own."""
    folder = str(tmp_path_factory.mktemp("caches"))
    return {"XLA_FLAGS": xla_flags(1), "XDG_CACHE_HOME": folder, "TFDS_DATA_DIR": str(data_dir)}


class Workspace:
    """A folder in which a page's commands find what they name."""

    def __init__(self, folder, forks, done, surroundings):
        self.folder, self.forks, self.done, self.surroundings = folder, forks, done, surroundings
        self.server, self.address = None, ""
        for name in ("main.py", "configs", "benchmarks"):
            (folder / name).symlink_to(ROOT / name)
        rng = np.random.default_rng(0)
        for name in ("path/to/pictures", "folder", "other"):
            (folder / name).mkdir(parents=True)
            for i in range(12):
                Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(folder / name / f"{i}.png")
                (folder / name / f"{i}.txt").write_text(f"picture number {i}")
        for name in ("a", "b", "noisy", "photo", "small"):
            shutil.copy(folder / "other" / "0.png", folder / f"{name}.png")
        (folder / "prompts.txt").write_text("ten\nninety\n")
        hole = np.zeros((8, 8), np.uint8)
        hole[2:5] = 255
        Image.fromarray(hole).save(folder / "hole.png")
        np.savez(folder / "pictures.npz", image=rng.integers(0, 256, (12, 8, 8, 1), np.uint8))

    def main(self, words):
        """Runs a command line of main.py to its end, as the tables above say.

        One that leaves nothing to the commands after it is run once, though several pages have it, and so is the
        training of a config as it stands.
        """
        plain = PLAIN_TRAINING.fullmatch(" ".join(words))
        if plain:
            self.trained(plain["config"], plain["workdir"])
            return
        self.run(words)

    def trained(self, config, workdir):
        """A run of a config as it stands, which is trained once for all pages."""
        kept = self.done / config
        with FileLock(f"{kept}.lock"):
            if not kept.exists():
                self.run(["python", "main.py", f"--config=configs/{config}.py", f"--workdir={workdir}"])
                shutil.copytree(self.folder / workdir, kept)
        if not (self.folder / workdir).exists():
            shutil.copytree(kept, self.folder / workdir)

    def run(self, words):
        count = 3 if words[1] == "-m" else 2
        if any(f"--mode={mode}" in words for mode in LEAVES_NOTHING) and not self.is_first(words):
            return
        flags, environment = self.adapted(words[count:])
        began = time.monotonic()
        status, output = self.forks.run([*words[:count], *flags], self.folder, environment)
        print(f"{time.monotonic() - began:5.1f} s  {' '.join(words[count:])}")
        assert status == 0, f"{' '.join([*words[:count], *flags])}\n{output}"

    def is_first(self, words):
        """Whether no page before had this very command."""
        name = self.done / hashlib.sha256(" ".join(words).encode()).hexdigest()
        try:
            name.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def serve(self, words):
        """Starts a server, which goes on until `close`."""
        self.close()
        self.prepare(dict(word.partition("=")[::2] for word in words[2:])["--workdir"])
        command = [sys.executable, *words[1:], "--port=0"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | self.forks.environment | self.surroundings
        self.server = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, text=True)
        self.address = re.search(r"http://127.0.0.1:\d+", self.server.stdout.readline())[0]

    def curl(self, words):
        """A call of the server that was started last."""
        called = [word.replace("http://127.0.0.1:8000", self.address) for word in words]
        output = subprocess.run(called, capture_output=True, text=True, check=True).stdout
        assert json.loads(output.splitlines()[-1])["state"] == "done", output

    def close(self):
        if self.server:
            self.server.terminate()
            assert self.server.wait(PATIENCE) == 0
            self.server.stdout.close()

    def adapted(self, flags):
        """(the flags to run with, the environment)."""
        given = [new for flag in flags for new in _replaced(flag)]
        environment = dict(self.surroundings)
        if "--distributed" in given:  # what a pod, Slurm and the like would say
            environment |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "1"}
            environment["JAX_PROCESS_ID"] = "0"
        value = dict(flag.partition("=")[::2] for flag in given)
        names = set(value)
        mode = value.get("--mode", "train")
        config = value.get("--config", "")
        if any(name in config for name in FROM_NETWORK) and "--config.data.source" not in names:
            given.append("--config.data.source=digits")
        if "--init_from" in names:  # of a run of digits, which predicts v
            given.append("--config.diffusion.prediction=v")
        if config:
            own = ("data.height", "data.width") if config in OF_A_CASCADE else ()
            given += [
                f"--config.{name}={x}"
                for name, x in TINY.items()
                if f"--config.{name}" not in names and name not in own
            ]
        if not {"--generated", "--against"} <= names:  # two sets of images and no run: nothing is sampled
            unused = names | ({"--likelihood_images"} if "clip" in value.get("--workdir", "") else set())
            given += [flag for flag in FEW.get(mode, []) if flag.partition("=")[0] not in unused]
        if mode not in ("train", "import", "compose") and not config and "--workdir" in names:
            self.prepare(value["--workdir"])
        for workdir in filter(None, (value.get("--init_from", ""), *value.get("--stages", "").split(","))):
            self.prepare(workdir)
        if value.get("--source") in ("stable-diffusion", "model.safetensors"):
            self.stable_diffusion()
        if value.get("--source") == "stable-diffusion-inpainting":
            folder = self.folder / value["--source"]
            stable_diffusions.write_narrow(folder, self.folder / "inpainting.safetensors", in_channels=9)
        if value.get("--source") in unclips.HUB.values():
            unclips.write(self.folder / value["--source"])
        if value.get("--source") == "a-diffusers-folder" and not (self.folder / "a-diffusers-folder").exists():
            self.prepare("runs/digits")
            self.main(["python", "main.py", "--mode=export", "--workdir=runs/digits", "--out=a-diffusers-folder"])
        return given, environment

    def stable_diffusion(self):
        """A narrow Stable Diffusion for pictures of 64x64, as a folder and as a file, and the tokenizer of both."""
        if not (self.folder / "stable-diffusion").exists():
            stable_diffusions.write_narrow(self.folder / "stable-diffusion", self.folder / "model.safetensors")
            shutil.copytree(self.folder / "stable-diffusion" / "tokenizer", self.folder / "path/to/tokenizer")

    def prepare(self, workdir):
        """Trains the run that a command is about, where no command before it did; `results` is of a command without."""
        if workdir == "results" or (self.folder / workdir).exists() or workdir == "runs/imported":
            return
        if workdir == "runs/sd15":
            self.stable_diffusion()
            self.main(["python", "main.py", "--mode=import", "--source=stable-diffusion", f"--workdir={workdir}"])
            return
        name = {"runs/classes": "digits_classes"}.get(workdir, workdir.removeprefix("runs/"))
        if not (ROOT / "configs" / f"{name}.py").exists():
            name = "digits"
        self.trained(name, workdir)


def _replaced(flag):
    for documented, (flags, _) in REPLACED.items():
        name, _, value = documented.partition("=")
        if flag == documented or (value == "*" and flag.startswith(f"{name}=")):
            return [new.replace("PORT", str(free_port())) for new in flags]
    return [flag]


def check_install(words):
    """Of pip's arguments: this project with extras that it has, or a package that the tests know."""
    for word in words:
        target, _, extras = word.partition("[")
        if target == "." and extras:
            assert set(extras.rstrip("]").split(",")) <= set(PYPROJECT["optional-dependencies"]), word
        else:
            assert word in ("-e", ".", "--no-deps", *INSTALLED_BY_NAME), f"pip install {word}"


def run_command(words, workspace):
    match words:
        case _ if tuple(words) in ELSEWHERE:
            pass
        case ["git", "clone", url]:
            assert url == REPOSITORY
        case ["pip", "install", *rest]:
            check_install(rest)
        case ["python", "main.py", "--mode=serve", *_]:
            workspace.serve(words)
        case ["curl", *_]:
            workspace.curl(words)
        case ["python", "main.py", *_] | ["python", "-m", "ddpm_jax", *_]:
            workspace.main(words)
        case ["python", "-m", "pytest", *rest]:
            check_pytest(rest)
        case ["python", script, *rest] if script.startswith("benchmarks/"):
            check_benchmark(script, rest)
        case _:
            pytest.fail(f"tests/test_docs.py does not know how to run {' '.join(words)!r}")


def check_pytest(arguments):
    """pytest takes these arguments, and the files that they name are there."""
    assert all((ROOT / argument).exists() for argument in arguments if argument.startswith("tests/")), arguments
    check_help([sys.executable, "-m", "pytest", "--version", *arguments])


def check_benchmark(script, arguments):
    """A benchmark takes minutes to hours: its --help must know the flags."""
    output = check_help([sys.executable, script, "--help"])
    for argument in arguments:
        if argument.startswith("--"):
            assert argument.partition("=")[0] in output


def check_help(command):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture
def same_tables():
    """The samplers are afterwards what they were, for a page adds one."""
    known = [(table, dict(table)) for table in (tables.SAMPLERS, tables.DEFAULT_SPACING)]
    yield
    for table, before in known:
        table.clear()
        table.update(before)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_commands_and_code_run(page, forks, done, surroundings, tmp_path, monkeypatch, same_tables):
    monkeypatch.chdir(tmp_path)
    workspace, namespace = Workspace(tmp_path, forks, done, surroundings), {}
    for block in blocks(page):
        if block.kind == "sh":
            for words in commands(block):
                run_command(words, workspace)
        elif block.kind == "python":
            for workdir in re.findall(r'load\("([^"]+)"', block.text):
                workspace.prepare(workdir)
            exec(compile(block.text, str(block), "exec"), namespace)
        else:
            is_output = block.text.startswith(OUTPUT.get(page, ()))
            assert is_output, f"{block}: tests/test_docs.py does not know what to do with it"
    workspace.close()


def test_tables_hold_nothing_that_is_not_documented():
    words = [words for page in PAGES for block in blocks(page) if block.kind == "sh" for words in commands(block)]
    flags = {flag for command in words for flag in command}
    for documented in REPLACED:
        name, _, value = documented.partition("=")
        assert any(flag == documented or (value == "*" and flag.startswith(f"{name}=")) for flag in flags), documented
    assert set(ELSEWHERE) <= {tuple(command) for command in words}
    for page, beginnings in OUTPUT.items():
        for beginning in beginnings:
            assert any(block.text.startswith(beginning) for block in blocks(page))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in links(page):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), f"{page}: {target}"
        if anchor and not anchor.startswith("ddpm_jax."):  # those are made when the site is built, which checks them
            assert anchor in anchors(str(found.resolve().relative_to(ROOT))), f"{page}: {target}"


def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def figures():
    return load_script(ROOT / "docs" / "figures.py")


@pytest.fixture(scope="module")
def hook():
    pytest.importorskip("latex2mathml", reason="pip install -e '.[docs]'")
    return load_script(ROOT / "docs" / "_hooks" / "site.py")


class TestFigures:
    @pytest.mark.parametrize(
        ("config", "parameters"),
        [
            (cifar10, 35_746_307),
            pytest.param(celebahq256, 113_673_219, marks=pytest.mark.slow),
            pytest.param(cifar10_article, None, marks=pytest.mark.slow),
            (digits, None),
        ],
    )
    def test_blocks_are_the_network_s(self, figures, config, parameters):
        config = config.get_config()
        found = figures.unet_blocks(config)
        params = flatten_dict(config_lib.make_model(config).param_shapes())
        assert sum(block.parameters for block in found) == sum(leaf.size for leaf in params.values())
        assert parameters in (None, sum(block.parameters for block in found))
        assert {block.name for block in found} == {path[0] for path in params} | {
            block.name for block in found if block.parameters == 0
        }
        levels, blocks_a_level = len(config.model.channel_multipliers), config.model.num_res_blocks
        # conv_in, and a level's blocks and its halving, each once.
        skips = [block.skip for block in found if block.skip]
        assert len(skips) == len(set(skips)) == 1 + levels * (blocks_a_level + 1) - 1
        assert len(skips) == levels * (blocks_a_level + 1)
        by_name = {block.name: block for block in found}
        for block in found:
            if block.skip:
                assert by_name[block.skip].shape[:2] == block.shape[:2]
                assert block.channels > by_name[block.skip].shape[-1]

    def test_cifar10_is_the_paper_s(self, figures):
        found = figures.unet_blocks(cifar10.get_config())
        kinds = Counter(block.kind for block in found)
        assert (kinds["ResBlock"], kinds["AttentionBlock"]) == (4 * 2 + 2 + 4 * 3, 2 + 1 + 3)
        assert (kinds["Downsample"], kinds["Upsample"]) == (3, 3)
        attended = [block.shape for block in found if block.kind == "AttentionBlock"]
        assert attended == [(16, 16, 256)] * 2 + [(4, 4, 256)] + [(16, 16, 256)] * 3
        sizes = [block.shape[0] for block in found if block.kind == "Downsample"]
        assert sizes == [16, 8, 4]
        svg = figures.unet_svg(cifar10.get_config())
        assert (ROOT / "docs" / "images" / "unet.svg").read_text() == svg, "run python docs/figures.py"
        assert svg.count("<rect") == 1 + 4 + len(found)
        assert "35,746,307 parameters" in svg

    def test_pictures_are_diffused_by_the_library(self, figures):
        photograph, digit = figures.pictures()
        assert (photograph.shape, digit.shape) == ((64, 64, 3), (8, 8, 1))
        assert photograph.std() > 30
        assert digit.max() > 200

    @pytest.mark.slow
    def test_all_are_drawn(self, figures, tmp_path):
        figures.main(tmp_path)
        for name in ("forward.png", "schedules.png"):
            drawn, committed = Image.open(tmp_path / name), Image.open(ROOT / "docs" / "images" / name)
            assert drawn.size == committed.size
            drawn, committed = (np.asarray(image.convert("RGB"), float) for image in (drawn, committed))
            assert np.abs(drawn - committed).mean() < 3  # fonts differ by matplotlib's version


class TestSite:
    def test_every_field_has_a_meaning(self, hook):
        meanings = hook.config_meanings()
        names = [name for name, _ in config_lib.fields(config_lib.default_config())]
        assert [name for name in names if not meanings.get(name)] == []
        table = hook.config_fields()
        assert all(f"| `{name}` |" in table for name in names)
        assert "| `train.batch_size` | `128` | of all devices together |" in table
        assert "| `model.channels` | `128` | of the first level |" in table

    def test_every_flag_is_listed(self, hook):
        assert "| `--num_steps` |" in hook.flags()
        assert "| `--shard_size` | `1000` |" in hook.flags()
        assert "| `--seed` | `0` |" in hook.flags()

    def test_code_is_the_source_s(self, hook):
        assert hook.source("ddpm_jax.diffusion.gaussian.q_sample").splitlines()[1:] == [
            "def q_sample(schedule: Schedule, x_0: Images, t: Timesteps, noise: Images) -> Images:",
            "    a = extract(schedule.sqrt_alphas_cumprod, t, x_0.ndim)",
            "    s = extract(schedule.sqrt_one_minus_alphas_cumprod, t, x_0.ndim)",
            "    return a * x_0 + s * noise",
            "```",
        ]
        excerpt = hook.source('ddpm_jax.models.unet.UNet.__call__ from "skips = [h]" to "skips.append(h)"')
        assert excerpt.splitlines()[1] == "skips = [h]"
        assert excerpt.splitlines()[-2].endswith("skips.append(h)")

    @pytest.mark.parametrize(
        "line", ["ddpm_jax.diffusion.gaussian.q_sampel", 'ddpm_jax.pipeline.load from "nowhere in it"', "a b"]
    )
    def test_what_is_not_there_fails_the_build(self, hook, line):
        with pytest.raises(ValueError, match=r"has no|not a source line"):
            hook.source(line)

    def test_formulas_become_mathml(self, hook):
        page = hook.on_page_content('<p><span class="arithmatex">\\(a &lt; \\sqrt{b}\\)</span></p>')
        assert "<msqrt>" in page
        assert "arithmatex" not in page

    @pytest.mark.slow
    def test_site(self, tmp_path, page):
        """Builds without a warning; no page asks for anything beyond the site (the fixture sees to that)."""
        for name in ("material", "mkdocs", "mkdocstrings", "latex2mathml"):
            pytest.importorskip(name, reason="pip install -e '.[docs]'")
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        built = sorted(path for path in tmp_path.rglob("*.html") if path.name != "404.html")
        assert len(built) == len(list((ROOT / "docs").rglob("*.md")))
        for path in built:
            assert "{{" not in path.read_text()
            page.goto(path.as_uri())
            assert page.locator("h1").count() == 1
        page.goto((tmp_path / "article.html").as_uri())
        assert page.locator("math").count() > 40
