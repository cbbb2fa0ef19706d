"""Every command and every block of code of README.md and docs/ runs."""

import os
import re
import subprocess
import sys
import tomllib

import pytest
from documents import PAGES, ROOT, blocks, commands
from workspaces import REPLACED, Workspace
from xla import xla_flags

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
    "docs/cpu.md": ("step_profile digits, 2 device(s)",),
    "docs/playground.md": ('{"state": "compiling"}',),
}

# Commands of other kinds that are not run here.
ELSEWHERE = {
    ("mkdocs", "build", "--strict"): "tests/docs/test_site.py",
    ("python", "docs/figures.py"): "tests/docs/test_figures.py",
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
            ("--mode=sample", "--workdir=runs/mine_lora", "--prompt=a castle"),
            ("--config=configs/finetune.py:runs/sd15", "--workdir=runs/mine", "--config.data.path=path/to/pictures"),
            (
                *("--config=configs/finetune.py:runs/sd15", "--workdir=runs/mine_lora"),
                *("--config.data.path=path/to/pictures", "--config.lora.rank=16"),
                "--config.optimizer.learning_rate=1e-4",
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


def check_install(words):
    """pip's arguments name this project with extras that it has, or a package that the tests list."""
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
            pytest.fail(f"tests/docs/test_commands.py does not know how to run {' '.join(words)!r}")


def check_pytest(arguments):
    """pytest takes these arguments, and the files that they name are there."""
    assert all((ROOT / argument).exists() for argument in arguments if argument.startswith("tests/")), arguments
    check_help([sys.executable, "-m", "pytest", "--version", *arguments])


def check_benchmark(script, arguments):
    """A benchmark takes minutes to hours: its --help must list the flags."""
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
    """Restores the samplers afterwards, because a page adds one."""
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
            assert is_output, f"{block}: tests/docs/test_commands.py does not know what to do with it"
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
