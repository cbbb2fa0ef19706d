"""The site builds, and what its hook writes is right."""

import os
import subprocess
import sys

import pytest
from documents import PAGES, ROOT, load_script

from ddpm_jax import config as config_lib


@pytest.fixture(scope="module")
def hook():
    return load_script(ROOT / "docs" / "_hooks" / "site.py")


def test_every_field_has_a_meaning(hook):
    meanings = hook.config_meanings()
    names = [name for name, _ in config_lib.fields(config_lib.default_config())]
    assert [name for name in names if not meanings.get(name)] == []
    table = hook.config_fields()
    assert all(f"| `{name}` |" in table for name in names)
    assert "| `train.batch_size` | `128` | of all devices together |" in table
    assert "| `model.channels` | `128` | of the first level |" in table


def test_every_flag_is_listed(hook):
    assert "| `--num_steps` |" in hook.flags()
    assert "| `--shard_size` | `1000` |" in hook.flags()
    assert "| `--seed` | `0` |" in hook.flags()


def test_code_is_the_source_s(hook):
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
def test_what_is_not_there_fails_the_build(hook, line):
    with pytest.raises(ValueError, match=r"has no|not a source line"):
        hook.source(line)


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_every_line_of_a_page_is_filled_in(hook, page):
    assert "{{" not in hook.on_page_markdown((ROOT / page).read_text())


def test_formulas_become_mathml(hook):
    pytest.importorskip("latex2mathml", reason="pip install -e '.[docs]'")
    page = hook.on_page_content('<p><span class="arithmatex">\\(a &lt; \\sqrt{b}\\)</span></p>')
    assert "<msqrt>" in page
    assert "arithmatex" not in page


@pytest.mark.slow
def test_site(tmp_path, page):
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
