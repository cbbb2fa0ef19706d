import threading

import pytest

from ddpm_jax.config import default_config
from ddpm_jax.training.due import Calendar, is_passed


def calendar(stop=None, **minutes):
    config = default_config()
    config.train.num_steps = 20
    config.log.update(every_steps=2, sample_every_steps=10)
    config.evaluate.every_steps = 5
    config.checkpoint.update(every_steps=6, **minutes)
    return Calendar(config, stop or threading.Event())


@pytest.mark.parametrize(
    ("before", "step", "every", "passed"),
    [(0, 1, 1, True), (5, 6, 3, True), (6, 7, 3, False), (4, 8, 6, True), (6, 8, 6, False), (0, 9, 0, False)],
)
def test_a_multiple_is_passed(before, step, every, passed):
    assert is_passed(before, step, every) == passed


def test_everything_has_its_steps():
    after = {step: calendar().after(step - 1, step) for step in range(1, 21)}
    due = {
        name: [step for step in after if getattr(after[step], name)] for name in ("log", "save", "sample", "evaluate")
    }
    assert due["log"] == [*range(2, 21, 2)]
    assert due["save"] == [6, 12, 18, 20]
    assert due["sample"] == [10]  # the end has its own pictures
    assert due["evaluate"] == [5, 10, 15, 20]


def test_a_signal_stops_and_saves():
    stop = threading.Event()
    days = calendar(stop)
    assert not days.after(2, 3).stop
    stop.set()
    due = days.after(3, 4)
    assert due.stop
    assert due.save


def test_minutes_count_from_the_last_checkpoint():
    often = calendar(every_minutes=1e-9)
    assert often.after(1, 2).save
    assert not often.after(2, 3).save  # asked only where the step is logged
    seldom = calendar(every_minutes=1e9)
    seldom.saved()
    assert not seldom.after(1, 2).save
