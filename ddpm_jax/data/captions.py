"""The captions of a folder of pictures, in the usual layouts.

Two layouts are supported. The first is tables, as in the Hugging Face Hub's "imagefolder": `metadata.csv` or
`metadata.jsonl` anywhere under the folder, with the fields `file_name`, relative to the table's own folder, and `text`.
A picture may have several rows, or in JSON a list of texts. The second is a `.txt` file beside each picture, `cat.txt`
for `cat.png`, with one caption per line.
"""

import csv
import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpm_jax.runtime.errors import UserError

TABLES = ("metadata.csv", "metadata.jsonl")


def read_captions(root: Path, paths: Sequence[str]) -> list[tuple[str, ...]]:
    """The captions of each picture.

    Args:
      root: the folder.
      paths: of the pictures, relative to root.

    Raises:
      UserError: a picture without a caption, an empty caption, or an unreadable file; it names the path.
    """
    tables = sorted(path for path in root.rglob("metadata.*") if path.name in TABLES)
    found: dict[str, list[str]] = {}
    for table in tables:
        for where, name, texts in _rows(table):
            path = posixpath.normpath((table.parent.relative_to(root) / name).as_posix())
            found.setdefault(path, []).extend(_checked(texts, where))
    captions = []
    for path in paths:
        if path not in found and not tables:
            found[path] = _lines((root / path).with_suffix(".txt"), root / path)
        if path not in found:
            raise UserError(f"image {str(root / path)!r} has no caption: no row in {_names(tables)} has this file_name")
        captions.append(tuple(found[path]))
    return captions


def _names(tables: Iterable[Path]) -> str:
    return " or ".join(repr(str(table)) for table in tables)


def _lines(path: Path, picture: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise UserError(
            f"image {str(picture)!r} has no caption; accepted: a {path.name!r} beside it, or a table of captions for "
            f"the folder, {' or '.join(TABLES)} with file_name and text"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"caption {str(path)!r} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"caption {str(path)!r} cannot be read: {error.strerror}") from None
    return _checked([line for line in lines if line], f"caption {str(path)!r}")


def _checked(texts: Sequence[Any], where: str) -> list[str]:
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"{where} is empty; every image needs a caption")
    return [text.strip() for text in texts]


def _rows(table: Path) -> Iterator[tuple[str, str, list[Any]]]:
    """Yields (where the row is, its file name, its texts) for every row of a table."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file) if table.suffix == ".csv" else _objects(file, table)
            for number, row in enumerate(rows, 1):
                where = f"row {number} of {str(table)!r}"
                for field in ("file_name", "text"):
                    if row.get(field) is None:
                        raise UserError(f"{where} has no {field!r}; it has {', '.join(map(str, row)) or 'nothing'}")
                text = row["text"]
                yield f"the text in {where}", str(row["file_name"]), text if isinstance(text, list) else [text]
    except UnicodeDecodeError as error:
        raise UserError(f"{str(table)!r} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except csv.Error as error:
        raise UserError(f"{str(table)!r} is not valid CSV: {error}") from None
    except OSError as error:
        raise UserError(f"{str(table)!r} cannot be read: {error.strerror}") from None


def _objects(lines: Iterable[str], table: Path) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"line {number} of {str(table)!r} is not valid JSON: {error}") from None
            if not isinstance(value, dict):
                raise UserError(f"line {number} of {str(table)!r} is not a JSON object")
            yield value
