"""Files and folders that are written atomically."""

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ddpm_jax.runtime.errors import UserError, reason


def user_cache() -> Path:
    """The folder for reproducible or downloadable files: $XDG_CACHE_HOME/ddpm_jax, or ~/.cache/ddpm_jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "ddpm_jax"


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(4)}.{path.name}")  # hosts of a shared disk may have the same pid
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, "utf-8")


def read_json(path: Path, default: Any) -> Any:
    """The content of a JSON file, or the default if it does not exist; UserError if it is not JSON."""
    if not path.exists():
        return default
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of another project; UserError if it cannot be read or contains something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {reason(error)}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{str(path)!r} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{str(path)!r} is not a JSON object")
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a JSON Lines file, skipping truncated lines; empty if there is no file."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
            value = json.loads(line)
            found += [value] if isinstance(value, dict) else []
    return found


def add_json_line(path: Path, value: dict[str, Any]) -> None:
    """Appends a line to such a file, even if its last line was truncated."""
    with path.open("a+") as file:
        file.seek(0)
        is_cut_off = (file.read() or "\n")[-1] != "\n"
        file.write("\n" * is_cut_off + json.dumps(value) + "\n")


@contextmanager
def new_folder(path: str | os.PathLike, what: str, passing: str = "") -> Iterator[Path]:
    """A temporary folder beside `path`, renamed to it when the block ends without an error.

    Args:
      path: must not exist, or be an empty folder.
      what: the name of the folder in a UserError's message.
      passing: the name of a file that may be in the folder, but must be gone when the block ends.

    Raises:
      UserError: the folder is not empty or cannot be written.
    """
    try:
        target = Path(path).expanduser().resolve()
        if target.exists() and (not target.is_dir() or any(found.name != passing for found in target.iterdir())):
            raise UserError(f"{what} {str(path)!r} is not empty; choose a new one")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        temporary.chmod(0o755)
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of an unknown user
        raise UserError(f"{what} {str(path)!r} cannot be written: {error}") from None
    try:
        yield temporary
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"{what} {str(path)!r} cannot be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
