"""Files that are either whole or not there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddpm_jax.errors import UserError


def user_cache() -> Path:
    """The folder for what can be made or fetched again: $XDG_CACHE_HOME/ddpm_jax, or ~/.cache/ddpm_jax."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "ddpm_jax"


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text)


@contextmanager
def new_folder(path: str | os.PathLike, what: str) -> Iterator[Path]:
    """A temporary folder beside `path`, renamed to it when the block ends without an error.

    Args:
      path: must not be there, or be an empty folder.
      what: how the sentence of a UserError calls it.

    Raises:
      UserError: it holds something, or cannot be written.
    """
    try:
        target = Path(path).expanduser().resolve()
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{what} {str(path)!r} is there and not empty; choose a new one")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        temporary.chmod(0o755)
    except (OSError, RuntimeError) as error:  # RuntimeError: ~ of somebody who is not there
        raise UserError(f"{what} {str(path)!r} cannot be written: {error}") from None
    try:
        yield temporary
        temporary.replace(target)
    except OSError as error:
        raise UserError(f"{what} {str(path)!r} cannot be written: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
