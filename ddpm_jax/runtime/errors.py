"""The one exception for mistakes that the person who started the program can mend."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A wrong config value, file or flag, told in one sentence: what was found where, and what is accepted.

    `main.py` prints the sentence without a traceback and exits with status 1.
    """


def nearest(name: str, accepted: Iterable[str]) -> str:
    """' Did you mean ...?' if one of the accepted names is close, else ''."""
    close = difflib.get_close_matches(name, list(accepted), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def first_line(error: BaseException) -> str:
    """What an exception of a library says, without what follows in further lines; its kind if it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def reason(error: BaseException) -> str:
    """The same beside the path of a file, which the operating system's errors repeat."""
    return getattr(error, "strerror", None) or first_line(error)


@contextmanager
def as_user_errors() -> Iterator[None]:
    """Turns the ValueErrors of the mathematics, which say what is accepted, into UserErrors."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None
