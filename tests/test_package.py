"""What the wheel and the sdist hold, and the version that the project's files name."""

import re
import subprocess
import tomllib

from documents import ROOT

import ddpm_jax

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_wheel_holds_every_package():
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "ddpm_jax").rglob("*.py")}
    assert {*PYPROJECT["tool"]["setuptools"]["packages"]} == found | {"ddpm_jax.configs"}


def test_the_wheel_holds_the_files_that_are_not_code():
    data = PYPROJECT["tool"]["setuptools"]["package-data"]
    held = {
        path
        for package, names in data.items()
        for name in names
        for path in (ROOT / package.replace(".", "/")).glob(name)
    }
    others = {path for path in (ROOT / "ddpm_jax").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert held == others


def test_one_version():
    version = PYPROJECT["project"]["version"]
    assert ddpm_jax.__version__ == version
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == version
    newest = re.search(r"^## (\S+), (\S+): ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest[1] == version
    assert f"date-released: {newest[2]}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_sdist_names_every_folder():
    """MANIFEST.in lists every folder of the repository that no package holds."""
    done = subprocess.run(("git", "ls-files"), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:  # no git checkout
        return
    folders = {line.split("/")[0] for line in done.stdout.splitlines() if "/" in line} - {"ddpm_jax"}
    grafted = re.findall(r"^graft (.*)$", (ROOT / "MANIFEST.in").read_text(), re.MULTILINE)
    assert folders == set(grafted)
