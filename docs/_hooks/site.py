"""What the site takes from the code when it is built, so that no page holds a copy; mkdocs calls `on_...`.

A line of a page may be

    {{ source ddpm_jax.diffusion.gaussian.q_sample }}
    {{ source ddpm_jax.models.unet.UNet.__call__ from "skips = [h]" to "skips.append(h)" }}
    {{ include CHANGELOG.md }}
    {{ config_fields }}
    {{ may_change }}
    {{ flags }}

and formulas between dollar signs become MathML, which browsers draw without a script.
"""

import ast
import html
import importlib
import inspect
import re
import textwrap
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
_LINE = re.compile(r"^\{\{ *(\w+) *(.*?) *\}\}$", re.MULTILINE)
_EXCERPT = re.compile(r'([\w.]+)(?: from "([^"]*)")?(?: to "([^"]*)")?$')
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, **_) -> str:
    return _LINE.sub(lambda match: DIRECTIVES[match[1]](match[2]), markdown)


def on_page_content(html: str, **_) -> str:
    return _FORMULA.sub(lambda match: mathml(match[2], match[1] == "div"), html)


def mathml(formula: str, block: bool) -> str:
    """The formula as MathML, with its TeX as the text of the clipboard and of readers that know no MathML."""
    from latex2mathml.converter import convert

    formula = html.unescape(formula).strip()
    drawn = convert(formula, display="block" if block else "inline")
    return f'<span class="formula" title="{html.escape(formula)}">{drawn}</span>' if block else drawn


def source(argument: str) -> str:
    """The code of a function, class or method, without its docstring; or the lines from one that holds a text to the
    first after it that holds another. ValueError if the code has no such object or line."""
    match = _EXCERPT.match(argument)
    if match is None:
        raise ValueError(f"not a source line: {argument!r}")
    name, first, last = match.groups()
    path, lines, node = find(name)
    start, end = node.lineno - 1, node.end_lineno
    if node.decorator_list:
        start = node.decorator_list[0].lineno - 1
    hidden = range(0)
    if first is None and last is None and ast.get_docstring(node) is not None:
        hidden = range(node.body[0].lineno - 1, node.body[0].end_lineno)
    if first is not None:
        start = _line_with(first, lines, start, end, name)
    if last is not None:
        end = _line_with(last, lines, start, end, name) + 1
    code = [lines[i] for i in range(start, end) if i not in hidden]
    while code and not code[0].strip():
        code.pop(0)
    text = textwrap.dedent("\n".join(code)).strip("\n")
    where = f"{path.relative_to(ROOT)}, line {start + 1}"
    return f'```python title="{where}"\n{text}\n```'


def find(name: str) -> tuple[Path, list[str], ast.ClassDef | ast.FunctionDef]:
    """(file, its lines, syntax tree) of "package.module.Class.method", read and not imported."""
    parts = name.split(".")
    count = next(n for n in range(len(parts), 0, -1) if ROOT.joinpath(*parts[:n]).with_suffix(".py").is_file())
    path = ROOT.joinpath(*parts[:count]).with_suffix(".py")
    text = path.read_text()
    node: ast.AST = ast.parse(text)
    for part in parts[count:]:
        found = [n for n in ast.walk(node) if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part]
        if not found:
            raise ValueError(f"{path.relative_to(ROOT)} has no {name}")
        node = found[0]
    return path, text.splitlines(), node


def _line_with(text: str, lines: list[str], start: int, end: int, name: str) -> int:
    for number in range(start, end):
        if text in lines[number]:
            return number
    raise ValueError(f"{name} has no line with {text!r}")


def include(path: str) -> str:
    """A file of the repository whose links to files that are not part of the site lead to the repository."""
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]

    def link(match: re.Match) -> str:
        target = match[2]
        if "://" in target or target.startswith("#"):
            return match[0]
        inside, _, anchor = target.partition("#")
        found = (ROOT / path).parent.joinpath(inside).resolve().relative_to(ROOT)
        if not (ROOT / found).exists():
            raise ValueError(f"{path} links to {target}, which is not there")
        if found.parts[0] == "docs" and found.suffix in (".md", ".png", ".svg"):
            return f"{match[1]}({found.relative_to('docs')}{'#' + anchor if anchor else ''})"
        return f"{match[1]}({repository}/blob/main/{found})"

    return re.sub(r"(\[[^\]]*\])\(([^)]+)\)", link, (ROOT / path).read_text())


def config_fields(_: str = "") -> str:
    """One table per section, of `default_config` and its comments, in its order."""
    from ddpm_jax.config import default_config, fields

    meanings = config_meanings()
    order = list(meanings)
    rows: dict[str, list[str]] = {}
    for name, value in sorted(fields(default_config()), key=lambda field: order.index(field[0])):
        section = name.rpartition(".")[0]
        shown = "{}" if value == {} else repr(value)
        rows.setdefault(section, []).append(f"| `{name}` | `{shown}` | {_cell(meanings.get(name, ''))} |")
    head = "| field | default | meaning |\n|-|-|-|\n"
    return "\n\n".join(
        (f"## {section}\n\n" if section else "") + head + "\n".join(lines) for section, lines in rows.items()
    )


def may_change(_: str = "") -> str:
    """The fields, and whole sections, that a resumed run may change."""
    from ddpm_jax.config.values import MAY_CHANGE

    return "\n".join(f"- `{name}`" for name in MAY_CHANGE)


def config_meanings() -> dict[str, str]:
    """{field: the comment behind it in `default_config`}, in its order."""
    from ddpm_jax import config

    found = {}
    for line in inspect.getsource(config.default_config).splitlines():
        field = re.match(r"    (?:config\.)?([a-z_]+(?:\.[a-z_]+)?) = (?!.*ConfigDict\(\)$)", line)
        if field:
            found[field[1]] = line.partition("  # ")[2]
    return found


def flags(_: str = "") -> str:
    """A table of the command line's flags, as --help has them."""
    from absl import flags as absl_flags

    module = importlib.import_module("ddpm_jax.cli")
    rows = ["| flag | default | meaning |", "|-|-|-|"]
    for flag in absl_flags.FLAGS.flags_by_module_dict()[module.__name__]:
        default = "" if flag.default in (None, "", []) else f"`{_shown(flag.default)}`"
        rows.append(f"| `--{flag.name}` | {default} | {_cell(flag.help)} |")
    return "\n".join(rows)


def _shown(value: object) -> str:
    return ",".join(value) if isinstance(value, list) else str(value).lower() if isinstance(value, bool) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ").strip()


DIRECTIVES = {
    "source": source,
    "include": include,
    "config_fields": config_fields,
    "may_change": may_change,
    "flags": flags,
}
