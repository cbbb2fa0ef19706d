"""The queue's turns, places, refusals and shutdown, with tasks controlled by the test."""

import threading

import pytest
from runs import PATIENCE

from ddpm_jax.runtime.errors import UserError
from ddpm_jax.serve.queue import FullError, Queue, Task


class Held:
    """A task that starts when its turn comes, and ends when the test allows it."""

    def __init__(self, queue, order=None, error=None, program="a"):
        self.begun, self.let, self.changed = threading.Event(), threading.Event(), threading.Event()
        self.told, self.order, self.error = [], [] if order is None else order, error
        self.task = Task(self.work, calls=10, weight=1.0, program=program, changed=self.changed.set)
        queue.submit(self.task)

    def work(self, task):
        self.order.append(self)
        self.begun.set()
        task.progress(5, 10)
        assert self.let.wait(PATIENCE)
        if self.error:
            raise self.error
        task.progress(10, 10)
        return {"pictures": []}

    def end(self):
        """All its events."""
        self.let.set()
        while not self.told or self.told[-1]["state"] not in ("done", "failed"):
            assert self.changed.wait(PATIENCE)
            self.changed.clear()
            self.told += self.task.events()
        return self.told


@pytest.fixture
def queue():
    queue = Queue(2)
    yield queue
    queue.close()
    queue.join()


def test_jobs_take_turns_and_report_their_place(queue):
    order = []
    held = [Held(queue, order)]
    assert held[0].begun.wait(PATIENCE)
    held += [Held(queue, order), Held(queue, order)]
    assert [queue.place(one.task) for one in held] == [None, (1, None), (2, None)]
    for one in held:
        assert one.end()[-1] == {"state": "done", "pictures": []}
    assert order == held
    assert [one.told[0]["state"] for one in held] == ["compiling", "running", "running"]


def test_a_full_queue_refuses_and_says_how_long_it_is(queue):
    first = Held(queue)
    assert first.begun.wait(PATIENCE)
    held = [Held(queue), Held(queue)]
    with pytest.raises(FullError) as refusal:
        Held(queue)
    assert (refusal.value.waiting, refusal.value.seconds) == (2, None)
    first.end()
    assert held[0].begun.wait(PATIENCE)
    ahead, seconds = queue.place(held[1].task)
    assert ahead == 1
    assert seconds > 0  # from what the first took
    held += [Held(queue)]
    with pytest.raises(FullError) as refusal:
        queue.check()
    assert refusal.value.seconds > seconds
    for one in held:
        one.end()
    queue.check()


def test_cancelling_a_job_that_waits_and_one_that_runs(queue):
    running, waiting, last = Held(queue), Held(queue), Held(queue)
    assert running.begun.wait(PATIENCE)
    queue.cancel(waiting.task)
    queue.cancel(running.task)
    running.let.set()  # its next call ends it
    assert last.end()[-1]["state"] == "done"
    assert not waiting.begun.is_set()
    assert running.task.done == 10
    assert "done" not in [event["state"] for event in running.task.events()]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [(UserError("too much"), "too much"), (RuntimeError("no memory\nat all"), "computing this failed: no memory")],
)
def test_a_failed_job_is_reported_and_the_next_is_done(queue, error, sentence, capsys):
    first, second = Held(queue, error=error), Held(queue)
    assert first.end()[-1] == {"state": "failed", "error": sentence}
    assert second.end()[-1]["state"] == "done"
    assert ("Traceback" in capsys.readouterr().err) == isinstance(error, RuntimeError)


def test_closing_ends_those_that_wait_and_lets_no_more_in(queue):
    running, waiting = Held(queue), Held(queue)
    assert running.begun.wait(PATIENCE)
    queue.close()
    running.let.set()
    for one in (running, waiting):
        assert [event["state"] for event in one.end()].count("failed") == 1
        assert one.told[-1] == {"state": "failed", "error": "the playground is shutting down"}
    queue.join()
    assert not waiting.begun.is_set()
    with pytest.raises(UserError, match="is shutting down"):
        Held(queue)
