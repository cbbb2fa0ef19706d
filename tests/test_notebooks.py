"""The notebooks: what is committed of them, and that they run, on tiny runs."""

import os
import tomllib
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from runs import PATIENCE
from xla import xla_flags

import ddpm_jax
from configs import digits, digits_classes, numbers
from ddpm_jax.config import differences

ROOT = Path(__file__).parents[1]
CONFIGS = {"train_and_sample": digits, "what_a_diffusion_model_can_do": digits_classes, "text_to_image": numbers}
NOTEBOOKS = sorted(CONFIGS)

# One run serves the first two: a small class-conditional network, so that the second notebook finds the first one's.
TINY = """
WORKDIR = "WHERE"
NUM_STEPS = 30

import ddpm_jax

whole = ddpm_jax.train


def train(config, workdir):
    config.model.update(channels=8, num_groups=4, channel_multipliers=(1,))
    config.model.update(attention_resolutions=(), middle_attention=False)
    config.diffusion.num_timesteps = 50
    if not config.text.encoder:
        config.model.class_conditional = True
        config.train.label_dropout = 0.15
    config.log.sample_steps = 0
    config.sample.batch_size = 10  # so that most cells share a compiled program
    whole(config, workdir)


ddpm_jax.train = train
"""


def read(name):
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook, tag):
    (cell,) = [cell for cell in code_cells(notebook) if tag in cell.metadata.get("tags", ())]
    return cell


def shown(cell):
    """What a cell shows, by kind: "stdout", "stderr", "image/png", ..."""
    kinds = []
    for output in cell.outputs:
        kinds += [output.name] if output.output_type == "stream" else list(output.get("data", ()))
    return sorted(set(kinds) - {"image/jpeg", "text/plain"})  # which come beside a PNG


def test_all_notebooks_are_tested():
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == NOTEBOOKS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_can_be_opened_in_colab(name):
    notebook = read(name)
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    assert code_cells(notebook)[0] is tagged(notebook, "install")
    assert f"    %pip install --quiet git+{repository}" in tagged(notebook, "install").source.splitlines()
    in_colab = repository.replace("https://github.com", "https://colab.research.google.com/github")
    assert f"({in_colab}/blob/main/notebooks/{name}.ipynb)" in notebook.cells[0].source
    assert code_cells(notebook)[1] is tagged(notebook, "parameters")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_trains_what_the_config_file_trains(name):
    values = {"ddpm_jax": ddpm_jax, "NUM_STEPS": 7}
    exec(tagged(read(name), "config").source, values)
    expected = CONFIGS[name].get_config()
    assert differences(expected, values["config"]) == []
    assert values["config"].train.num_steps == 7
    parameters = {}
    exec(tagged(read(name), "parameters").source, parameters)
    assert parameters["NUM_STEPS"] == expected.train.num_steps


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_is_committed_clean(name):
    nbformat.validate(read(name))
    path = ROOT / "notebooks" / f"{name}.ipynb"
    assert path.stat().st_size < 1.5e6
    for number, cell in enumerate(code_cells(read(name)), 1):
        assert cell.execution_count == number
        assert set(cell.metadata) <= {"tags"}
        assert "stderr" not in shown(cell) or "ddpm_jax.train(" in cell.source
        for output in cell.outputs:
            assert output.output_type != "error"
            assert "image/jpeg" not in output.get("data", ())
            assert "warning" not in output.get("text", "").lower()
            assert len(output.get("text", "").splitlines()) < 40


@pytest.mark.slow
def test_run_and_show_what_is_committed(tmp_path):
    environment = os.environ | {
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYTHONPATH": str(ROOT),
        "TFDS_DATA_DIR": str(tmp_path / "data"),
        "XLA_FLAGS": xla_flags(1),
    }
    for name, where in (
        ("train_and_sample", "run"),
        ("what_a_diffusion_model_can_do", "run"),
        ("text_to_image", "numbers"),
    ):
        notebook = read(name)
        committed = [shown(cell) for cell in code_cells(notebook)]
        assert sum(kind.startswith("image/") for kinds in committed for kind in kinds) >= 8
        tagged(notebook, "parameters").source = TINY.replace("WHERE", where)
        for cell in code_cells(notebook):
            cell.outputs = []
        resources = {"metadata": {"path": tmp_path}}
        patience = {"timeout": PATIENCE, "startup_timeout": PATIENCE}
        NotebookClient(notebook, **patience, kernel_name="python3", resources=resources).execute(env=environment)
        for cell, kinds in zip(code_cells(notebook), committed, strict=True):
            # Only the first notebook trains and prints progress to stderr.
            assert set(shown(cell)) - {"stderr"} == set(kinds) - {"stderr"}, cell.source
