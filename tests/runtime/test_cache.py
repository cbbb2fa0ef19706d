import threading
import time

import pytest

from ddpm_jax.runtime.cache import Cache


def squares(asked):
    """A `make` function that records its calls."""

    def make(keys):
        asked.append(keys)
        return [key**2 for key in keys]

    return make


def test_each_key_is_made_once_and_only_what_is_missing():
    cache, asked = Cache(10), []
    assert cache([3, 1, 3], squares(asked)) == [9, 1, 9]
    assert cache([1, 2, 3, 2], squares(asked)) == [1, 4, 9, 4]
    assert cache([], squares(asked)) == []
    assert asked == [[3, 1], [2]]
    assert len(cache) == 3


def test_the_least_recently_used_is_dropped():
    cache, asked = Cache(2), []
    for keys in ([1], [2], [1], [3], [1], [2]):
        assert cache(keys, squares(asked)) == [keys[0] ** 2]
    assert asked == [[1], [2], [3], [2]]


@pytest.mark.parametrize("most", [0, 1, 3])
def test_more_keys_than_are_kept(most):
    cache, asked = Cache(most), []
    assert cache(range(5), squares(asked)) == [0, 1, 4, 9, 16]
    assert len(cache) == max(most, 1)
    assert cache([4], squares(asked)) == [16]
    assert len(asked) == 1


def test_a_maker_of_other_numbers_of_results():
    with pytest.raises(ValueError, match="shorter"):
        Cache(3)([1, 2], lambda keys: keys[:1])


def test_what_fails_is_made_again():
    cache = Cache(3)
    with pytest.raises(ZeroDivisionError):
        cache([1, 0], lambda keys: [1 // key for key in keys])
    assert cache([0], squares([])) == [0]


def test_threads_make_a_key_once():
    cache, asked, found = Cache(3), [], []

    def make(keys):
        time.sleep(0.1)  # in which the other thread comes
        return squares(asked)(keys)

    threads = [threading.Thread(target=lambda: found.append(cache([5], make))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (asked, found) == ([[5]], [[25]] * 3)
