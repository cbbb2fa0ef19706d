"""The fixture `measure`, and the page "How exact is it" made from its measurements.

    python -m pytest --exactness=docs/exactness.md

runs only the tests that measure, and rewrites the page from their measurements.
"""

import importlib.metadata
import platform
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "exactness.md"
SECTIONS = {
    "tests/diffusion/test_schedules.py": "Schedules",
    "tests/diffusion/test_gaussian.py": "Forward process, posterior, variances",
    "tests/diffusion/test_bound.py": "The bound in bits/dim",
    "tests/diffusion/test_tables.py": "Samplers' coefficients",
    "tests/diffusion/test_samplers.py": "Sampling",
    "tests/models/test_blocks.py": "Layers and their initialisation",
    "tests/models/test_unet.py": "The network",
    "tests/models/test_spatial.py": "The spatial transformer",
    "tests/text/test_tokenizers.py": "Tokenizers",
    "tests/test_golden.py": "Golden numbers",
    "tests/interop/test_peers.py": "Against diffusers and PyTorch",
    "tests/interop/diffusers/test_peers.py": "Other networks and schedulers of diffusers",
    "tests/interop/diffusers/test_autoencoder.py": "The autoencoder",
    "tests/interop/diffusers/test_stable_diffusion.py": "Whole pipelines of Stable Diffusion",
    "tests/interop/diffusers/test_unet_condition": "Stable Diffusion's network",
    "tests/interop/diffusers/test_prior_peers.py": "DALL-E 2's prior",
    "tests/interop/diffusers/test_deepfloyd_peers.py": "Whole pipelines of DeepFloyd IF",
    "tests/interop/diffusers/test_unclip_peers.py": "Whole pipelines of Karlo",
    "tests/interop/transformers/test_clip.py": "CLIP's encoders",
    "tests/interop/transformers/test_image_encoder.py": "CLIP's image encoder by itself",
    "tests/training/test_contrastive.py": "CLIP's loss",
    "tests/interop/transformers/test_t5.py": "T5's encoder",
    "tests/interop/test_single_file.py": "Single files of Stable Diffusion",
    "tests/interop/test_lora.py": "LoRA",
    "tests/interop/test_stable_diffusion_peers.py": "Stable Diffusion's folders and LoRAs of runs",
    "tests/training/test_objectives_peers.py": "Fine-tuning a Stable Diffusion",
    "tests/evaluation/test_peers.py": "Evaluation",
    "tests/evaluation/test_agreement.py": "Agreement of picture and text",
}
HEAD = """# How exact is it

This page lists every comparison that the tests make with a reference outside this project: formulas evaluated in
float64 or extended precision, laws that must hold, SciPy, diffusers, transformers and PyTorch. Each error is the
largest over all cases of its test; it is relative where the tolerance says "relative". Monte Carlo estimates are
measured in standard errors, and a deviation of up to 5 is allowed.

This page is written by the tests themselves, from the errors that they measured:

    pip install -e '.[test,peers]' && pip install --no-deps torch-fidelity
    python -m pytest --exactness=docs/exactness.md

Measured on {machine}, with {versions}.
To run the test of a row, pass the name in its last column to `python -m pytest`.
"""
RECORDS = pytest.StashKey[dict]()


def pytest_addoption(parser):
    parser.addoption("--exactness", metavar="PAGE", help="run the tests that measure, and write the page from them")


def pytest_configure(config):
    config.stash[RECORDS] = {}


def pytest_collection_modifyitems(config, items):
    if config.getoption("--exactness"):
        measuring = [item for item in items if "measure" in item.fixturenames]
        config.hook.pytest_deselected(items=[item for item in items if item not in measuring])
        items[:] = measuring


@pytest.fixture
def measure(request):
    """measure(what, against, error, tolerance, unit=""): fails above the tolerance, and takes the error down.

    The page must have the row, so that no comparison is left out of it.
    """
    writing = request.config.getoption("--exactness")
    page = "" if writing else PAGE.read_text()

    def measure(what, against, error, tolerance, unit=""):
        error = float(error)
        assert error <= tolerance, f"{what}, against {against}: {error:g} > {tolerance:g} {unit}"
        assert writing or f"| {what} | {against} |" in page, f"{PAGE} has no row {what!r}: write it anew, --exactness"
        test = request.node.nodeid.partition("[")[0]
        key = (what, against, unit, test)
        records = request.config.stash[RECORDS]
        worst, _ = records.get(key, (0.0, 0.0))
        records[key] = (max(worst, error), tolerance)

    return measure


def pytest_sessionfinish(session, exitstatus):
    target = session.config.getoption("--exactness")
    if not target:
        return
    skipped = session.config.pluginmanager.get_plugin("terminalreporter").stats.get("skipped")
    if exitstatus or skipped or not session.config.stash[RECORDS]:
        session.config.get_terminal_writer().line(f"\n{target} is not written: not every test ran and passed")
        session.exitstatus = exitstatus or pytest.ExitCode.TESTS_FAILED
        return
    assert all(key[-1].startswith(tuple(SECTIONS)) for key in session.config.stash[RECORDS])
    lines = [HEAD.format(machine=_machine(), versions=_versions())]
    for path, title in SECTIONS.items():
        rows = [(key, value) for key, value in session.config.stash[RECORDS].items() if key[-1].startswith(path)]
        lines += [f"## {title}\n", "| What | Against | Tolerance | Measured | Test |", "|-|-|-|-|-|"]
        for (what, against, unit, test), (error, tolerance) in rows:
            number = lambda value: f"{value:.2g} {unit}".strip()  # noqa: B023, E731
            lines.append(f"| {what} | {against} | {number(tolerance)} | {number(error)} | `{test}` |")
        lines.append("")
    Path(target).write_text("\n".join(lines))


def _machine():
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.processor() or platform.machine()


def _versions():
    packages = ("jax", "flax", "numpy", "scipy", "torch", "diffusers", "transformers", "torch-fidelity")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
