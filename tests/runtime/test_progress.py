import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_jax.runtime.progress import format_seconds, part_of

ROOT = Path(__file__).parents[2]

# A clock that moves only when the test sets it.
PRELUDE = """
import sys, time
now = 1000.0
time.monotonic = lambda: now
from ddpm_jax.runtime.progress import ProgressBar
"""


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}


def plain(code):
    """The lines that a program without a terminal writes to stderr; stdout must be empty."""
    command = [sys.executable, "-c", PRELUDE + code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    assert result.stdout == ""
    return result.stderr.splitlines()


def live(code, status=0):
    """A program's stdout, and the output that its terminal has received."""
    controller, terminal = pty.openpty()
    command = [sys.executable, "-c", "from ddpm_jax.runtime.progress import ProgressBar\n" + code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, text=True, env=environment())
    os.close(terminal)
    received = b""
    try:
        while chunk := os.read(controller, 4096):
            received += chunk
    except OSError:  # how Linux says that the other side has closed
        pass
    os.close(controller)
    output, _ = process.communicate()
    assert process.returncode == status, received.decode()
    return output, received.decode()


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0:00"),
        (0.4, "0:00"),
        (0.5, "0:01"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (61, "1:01"),
        (3599.4, "59:59"),
        (3599.6, "1:00:00"),
        (3723, "1:02:03"),
        (360_000, "100:00:00"),
    ],
)
def test_format_seconds(seconds, expected):
    assert format_seconds(seconds) == expected


def test_parts_report_progress_of_the_whole():
    told = []
    for part in range(3):
        part_of(lambda *told_of: told.append(told_of), part, 3)(10, 20)
    assert told == [(10, 60), (30, 60), (50, 60)]
    assert part_of(None, 0, 3) is None


def test_report_is_a_line_with_position_text_and_time_left():
    lines = plain(
        "with ProgressBar('training', 40, interval=None) as bar:\n"
        "    print(bar.is_live, file=sys.stderr)\n"
        "    bar.update(5, text='unseen')\n"
        "    now += 30\n"
        "    bar.update(10)\n"
        "    bar.report('loss 0.5')\n"
        "    now += 90\n"
        "    bar.update(40, text='unseen')\n"
        "    bar.report('')\n"
    )
    assert lines == ["False", "training 10/40  loss 0.5, 3:00 left", "training 40/40, 0:00 left"]


def test_time_left_counts_from_the_start_of_this_process():
    lines = plain(
        "bar = ProgressBar('training', 40, start=10, interval=None)\n"
        "bar.report('resumed')\n"
        "now += 10\n"
        "bar.done = 20\n"
        "bar.report('going')\n"
    )
    assert lines == ["training 10/40  resumed", "training 20/40  going, 0:20 left"]


def test_time_left_leaves_out_the_wait_for_the_first_step():
    """That time may include compilation, and the total may only be known then."""
    lines = plain(
        "with ProgressBar('sampling', 0, interval=10) as bar:\n"
        "    now += 60\n"
        "    bar.update(1, 100)\n"
        "    now += 20\n"
        "    bar.update(11, 100)\n"
    )
    assert lines == ["sampling 1/100", "sampling 11/100, 2:58 left"]


def test_updates_give_a_line_every_interval_and_at_the_end():
    lines = plain(
        "with ProgressBar('decoding', 8, interval=10) as bar:\n"
        "    for done in range(1, 9):\n"
        "        now += 4\n"
        "        bar.update(done, text='images')\n"
    )
    assert lines == [
        "decoding 3/8  images, 0:20 left",
        "decoding 6/8  images, 0:08 left",
        "decoding 8/8  images, 0:00 left",
    ]


def test_work_that_is_done_at_once_gives_no_line():
    assert plain("with ProgressBar('decoding', 8) as bar:\n    for done in range(9): bar.update(done)\n") == []


def test_disabled_shows_nothing():
    assert (
        plain("with ProgressBar('x', 8, interval=0, enabled=False) as bar:\n  bar.update(8)\n  bar.report('y')\n") == []
    )
    assert live("with ProgressBar('x', 8, enabled=False) as bar:\n  bar.update(8)\n  print(bar.is_live)") == (
        "False\n",
        "",
    )


def test_live_bar_shows_description_text_and_share():
    output, received = live(
        "bar = ProgressBar('sampling', 4, start=1)\n"
        "print(bar.is_live)\n"
        "with bar:\n"
        "    bar.update(2, text='half way')\n"
        "    bar.done = 3\n"
        "    bar.report('loss 0.25')\n"
        "    with bar.aside():\n"
        "        with ProgressBar('inner work', 2) as inner:\n"
        "            inner.update(2)\n"
        "    bar.update(4, text='at the end')\n"
    )
    assert output == "True\n"
    for text in ("sampling", "inner work", "at the end", "100%"):
        assert text in received
    assert received.rindex("at the end") > received.rindex("inner work")
    assert received.rindex("\x1b[?25h") > received.rindex("\x1b[?25l"), "the cursor stays hidden"


def test_live_bar_lets_an_error_through():
    _, received = live("with ProgressBar('sampling', 4) as bar:\n    bar.update(1)\n    raise ValueError('oops')\n", 1)
    assert "sampling" in received
    assert "oops" in received  # Python 3.13 colours the words before it
    assert "\x1b[?25h" in received
