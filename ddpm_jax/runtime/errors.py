"""The exception for mistakes that the user can fix."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A wrong config value, file or flag, in one sentence: what was found where, and what is accepted.

    `main.py` prints the sentence without a traceback and exits with status 1.
    """


def nearest(name: str, accepted: Iterable[str]) -> str:
    """' Did you mean ...?' if one of the accepted names is close, else ''."""
    close = difflib.get_close_matches(name, list(accepted), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def first_line(error: BaseException) -> str:
    """The first line of a library's exception, or its class name if the message is empty."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def reason(error: BaseException) -> str:
    """The same, without the file's path that the operating system's errors repeat."""
    return getattr(error, "strerror", None) or first_line(error)


@contextmanager
def as_user_errors() -> Iterator[None]:
    """Turns the ValueErrors of the mathematics, which say what is accepted, into UserErrors."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None
