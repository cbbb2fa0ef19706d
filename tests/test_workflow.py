"""The workflow of the hosting service does what .ci/run does."""

import re
import tomllib

import pytest
from documents import ROOT, blocks

yaml = pytest.importorskip("yaml")
TESTS = re.compile(r"python -m pytest [^\n&]*-m (?:'[^']+'|\w+)")
SCRIPT = (ROOT / ".ci" / "run").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def jobs():
    return yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]


def commands(job):
    return [step["run"] for step in job["steps"] if "run" in step]


def test_its_checks_are_those_of_the_script(jobs):
    checks = [command for job in jobs.values() for command in commands(job) if not command.startswith("pip install")]
    assert checks
    for command in checks:
        assert command in SCRIPT
    assert set(TESTS.findall(SCRIPT)) == set(TESTS.findall("\n".join(checks)))


def test_its_quick_tests_are_those_of_the_readme(jobs):
    first, newer = jobs["quick"]["strategy"]["matrix"]["include"]
    install, check = commands(jobs["quick"])
    install = install.replace("${{ matrix.target }}", first["target"])
    assert any(f"{install} && {check}" in block.text for block in blocks("README.md") if block.kind == "sh")
    assert f">={first['python']}" == PROJECT["requires-python"]
    assert f"python_for {newer['python']}" in SCRIPT
    assert f'pip" install {newer["target"]}' in SCRIPT


def test_it_may_only_read(jobs):
    assert yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["permissions"] == {
        "contents": "read"
    }
    assert all("permissions" not in job for job in jobs.values())
