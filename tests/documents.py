"""Parses the documentation's code blocks, links and headings, and loads its scripts."""

import ast
import dataclasses
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
]
PROGRAMS = (".", "cd", "curl", "git", "mkdocs", "mypy", "pip", "python", "python3", "ruff", "ssh")


_COMMAND_IN_A_TABLE = re.compile(r"^\|.*\| `(python main\.py [^`]+)` \|")


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
    """The fenced and indented code blocks of a page of `PAGES`, and the commands in its tables."""
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
            if cell := _COMMAND_IN_A_TABLE.search(lines[number]):
                yield Block(page, first + 1, "sh", cell[1])
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
    """The lines that are not comments, each joined with its continuation lines."""
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


def load_script(path: Path) -> ModuleType:
    """The module of a script of `docs/`, which no package holds."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
