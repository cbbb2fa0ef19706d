"""The code blocks of the documentation, and a way to run its commands: real processes without the time of imports."""

import ast
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
]
PROGRAMS = (".", "cd", "curl", "git", "mkdocs", "mypy", "pip", "python", "python3", "ruff", "ssh")


@dataclasses.dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
      page, line: where it begins, from 1.
      kind: "sh", "python", or what its fence says; of an indented block what it looks like, "" if like neither.
      text: without fence and indentation.
    """

    page: str
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    """The fenced and indented code blocks of a page of `PAGES`."""
    return list(_blocks(page, (ROOT / page).read_text().splitlines()))


def _blocks(page: str, lines: list[str]) -> Iterator[Block]:
    number = 0
    while number < len(lines):
        first = number
        if lines[number].lstrip().startswith("```"):
            indent = len(lines[number]) - len(lines[number].lstrip())
            end = next(i for i in range(number + 1, len(lines)) if lines[i].strip() == "```")
            text = "\n".join(line[indent:] for line in lines[number + 1 : end])
            yield Block(page, first + 1, lines[number].strip(" `").split(" ")[0], text)
            number = end + 1
        elif lines[number].startswith("    ") and (number == 0 or not lines[number - 1].strip()):
            while number < len(lines) and (lines[number].startswith("    ") or not lines[number].strip()):
                number += 1
            text = "\n".join(line[4:] for line in lines[first:number]).strip()
            yield Block(page, first + 1, _kind(text), text)
        else:
            number += 1


def _kind(text: str) -> str:
    if all(line.split()[0] in PROGRAMS for line in _whole_lines(text)):
        return "sh"
    try:
        ast.parse(text)
    except SyntaxError:
        return ""
    return "python"


def _whole_lines(text: str) -> list[str]:
    """Those that are no comment, each with the lines that it goes on in."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def commands(block: Block) -> list[list[str]]:
    """The words of every command of a shell block."""
    parts = [part for line in _whole_lines(block.text) for part in line.split(" && ")]
    return [shlex.split(part, comments=True) for part in parts]


def links(page: str) -> list[str]:
    """The targets of a page's links and pictures, code left out."""
    text = (ROOT / page).read_text()
    for block in blocks(page):
        text = text.replace(block.text, "")
    text = re.sub(r"`[^`\n]*`", "", text)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


# Importing jax and its company takes longer than main.py on a tiny run: so one process imports them, touches no device,
# and forks for each command.
_SERVER = """
import importlib, json, os, runpy, sys, traceback

for module in "cli", "training.loop", "commands.editing", "commands.evaluation", "commands.plan", "commands.weights":
    importlib.import_module("ddpm_jax." + module)

def status_of(argv):
    sys.argv = argv[1:]
    try:
        if argv[1] == "-m":
            sys.argv = argv[2:]
            runpy.run_module(argv[2], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(argv[1], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        os.chdir(job["folder"])
        sys.path[0] = ""
        os.environ.update(job["environment"])
        status = status_of(job["argv"])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forks:
    """Runs "python main.py ..." and "python -m ddpm_jax ..." in processes forked from one that has imported all."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self.environment = folder, environment
        self._output = folder / "output.txt"
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, argv: Sequence[str], folder: Path, environment: dict[str, str]) -> tuple[int, str]:
        """(exit status, output) of a command started in the folder."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        job = {"argv": argv, "folder": str(folder), "output": str(self._output), "environment": environment}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        status = int(self._server.stdout.readline())
        return status, self._output.read_text()

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()
