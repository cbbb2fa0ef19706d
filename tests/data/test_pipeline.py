import itertools
import threading

import numpy as np
import pytest

from ddpm_jax.data.pipeline import batch_indices, epoch_permutation, host_batches, prefetch, several
from ddpm_jax.data.sources import open_source

N = 10  # images; no batch below divides it


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Image i is grey of level 10 i, and so is half of it; its label is i."""
    path = tmp_path_factory.mktemp("pipeline") / "images.npz"
    np.savez(path, image=np.full((N, 4, 4), 10 * np.arange(N)[:, None, None], np.uint8), label=np.arange(N))
    return open_source("array", path=str(path), height=2, width=4, channels=1, labels=True)


def batches(source, first_step=0, last_step=7, **options):
    arguments = {"seed": 3, "batch_size": 4, **options}
    return list(host_batches(source, first_step=first_step, last_step=last_step, **arguments))


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys() == {"image", "label", "index"}
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize(("seed", "epoch", "count"), [(0, 0, 10), (0, 5, 1), (7, 1, 1000)])
def test_epoch_permutation_is_a_permutation(seed, epoch, count):
    order = epoch_permutation(seed, epoch, count)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(count))


def test_epoch_permutation_differs_by_seed_and_epoch():
    orders = {tuple(epoch_permutation(seed, epoch, 50)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert tuple(range(50)) not in orders


@pytest.mark.parametrize(
    ("seed", "epoch", "expected"),
    [
        (0, 0, [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]),
        (0, 1, [3, 7, 4, 2, 9, 8, 1, 6, 5, 0]),
        (1, 0, [2, 0, 1, 4, 5, 6, 7, 8, 3, 9]),
    ],
)
def test_epoch_permutation_is_the_same_forever(seed, epoch, expected):
    """A run that is resumed with a later version must see its images in the same order."""
    assert epoch_permutation(seed, epoch, 10).tolist() == expected


@pytest.mark.parametrize("batch_size", [1, 4, 7, 10, 25])
def test_every_image_comes_once_an_epoch(batch_size):
    epochs = 7 if batch_size != 25 else 5
    steps = -(-epochs * N // batch_size)
    line = np.concatenate([batch_indices(0, step, batch_size, N) for step in range(steps)])
    line = line[: epochs * N].reshape(epochs, N)
    np.testing.assert_array_equal(np.sort(line), np.tile(np.arange(N), (epochs, 1)))
    assert len({tuple(epoch) for epoch in line}) == epochs
    np.testing.assert_array_equal(line[2], epoch_permutation(0, 2, N))


CACHES = pytest.mark.parametrize("cache_bytes", [1 << 20, 0], ids=["cached", "threads"])


@CACHES
def test_host_batches_hold_the_images_of_their_steps(source, cache_bytes):
    for step, batch in enumerate(batches(source, cache_bytes=cache_bytes)):
        indices = batch_indices(3, step, 4, N)
        assert batch["image"].dtype == np.uint8
        assert batch["label"].dtype == np.int32
        np.testing.assert_array_equal(batch["label"], indices)
        np.testing.assert_array_equal(batch["image"], np.broadcast_to(10 * indices[:, None, None, None], (4, 2, 4, 1)))
    assert step == 6


@CACHES
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_same_batches(source, cache_bytes, processes):
    shares = [
        batches(source, cache_bytes=cache_bytes, rows=np.arange(4).reshape(processes, -1)[index])
        for index in range(processes)
    ]
    assert {len(batch["label"]) for share in shares for batch in share} == {4 // processes}
    joined = [{k: np.concatenate([part[k] for part in parts]) for k in parts[0]} for parts in zip(*shares, strict=True)]
    assert_equal(joined, batches(source))


@CACHES
@pytest.mark.parametrize("first_step", [1, 5, 7])
def test_resuming_continues_with_the_same_batches(source, cache_bytes, first_step):
    whole = batches(source, cache_bytes=cache_bytes)
    assert_equal(batches(source, first_step, cache_bytes=cache_bytes), whole[first_step:])


def test_seeds_give_different_batches(source):
    one, other = ([batch["label"].tolist() for batch in batches(source, seed=seed)] for seed in (3, 4))
    assert one != other


class Counting:
    """A source that counts how often each of its images is decoded."""

    def __init__(self, source):
        self.source, self.shape, self.class_names = source, source.shape, source.class_names
        self.decoded = np.zeros(len(source), int)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        self.decoded[index] += 1
        return self.source[index]


def test_a_set_that_just_fits_is_decoded_once_and_as_it_is_needed(source):
    """The limit is the size of the decoded images."""
    for cache_bytes, decoded in ((N * 2 * 4, 1), (N * 2 * 4 - 1, 2)):
        counting = Counting(source)
        batches(counting, last_step=5, cache_bytes=cache_bytes)  # two epochs
        assert counting.decoded.tolist() == [decoded] * N
    counting = Counting(source)
    batches(counting, first_step=1, last_step=2)
    assert np.flatnonzero(counting.decoded).tolist() == sorted(batch_indices(3, 1, 4, N))


def test_an_image_that_comes_twice_in_a_batch_is_decoded_once(source):
    counting = Counting(source)
    (batch,) = batches(counting, last_step=1, batch_size=25)
    assert counting.decoded.tolist() == [1] * N
    np.testing.assert_array_equal(batch["label"], batch_indices(3, 0, 25, N))


def test_cached_and_threads_agree(source):
    assert_equal(batches(source, cache_bytes=0), batches(source))


@pytest.mark.slow
@pytest.mark.parametrize("first_step", [0, 2])
def test_worker_processes_agree(source, first_step):
    ours = batches(source, first_step, cache_bytes=0, num_workers=2)
    assert_equal(ours, batches(source, first_step))


@pytest.mark.parametrize("depth", [1, 2, 5, 50])
@pytest.mark.parametrize("length", [0, 1, 20])
def test_prefetch_keeps_the_order(depth, length):
    assert list(prefetch(iter(range(length)), depth)) == list(range(length))


@pytest.mark.parametrize("depth", [1, 3])
def test_prefetch_works_so_far_ahead_in_another_thread(depth):
    taken, threads = [], set()

    def numbers():
        for i in itertools.count():
            taken.append(i)
            threads.add(threading.get_ident())
            yield i

    iterator = prefetch(numbers(), depth)
    assert list(itertools.islice(iterator, 4)) == [0, 1, 2, 3]
    iterator.close()  # waits for work in progress
    assert len(taken) == 4 + depth
    assert len(threads) == 1
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("depth", [1, 2, 10])
def test_prefetch_raises_an_error_where_its_item_would_be(depth):
    def numbers():
        yield from range(3)
        raise OSError("item 3")

    iterator, got = prefetch(numbers(), depth), []
    with pytest.raises(OSError, match="item 3"):
        got.extend(iterator)
    assert got == [0, 1, 2]


@pytest.mark.parametrize(("first_step", "sizes"), [(0, [3, 3, 1]), (2, [1, 3, 1])])
def test_several_steps_are_stacked_up_to_a_multiple(source, first_step, sizes):
    single = batches(source, first_step)
    groups = list(several(iter(single), first_step, 3))
    assert [len(group["label"]) for group in groups] == sizes
    joined = [
        {name: values[i] for name, values in group.items()} for group in groups for i in range(len(group["label"]))
    ]
    assert_equal(joined, single)
