"""lab/threads.py: batches side by side."""

import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from itertools import count

from lab.threads import MOST, SMALLEST, Crew, results

import pytest
import torch

CPU = torch.device("cpu")
THREE = [range(i, i + 1) for i in range(3)]


@pytest.fixture
def crew(monkeypatch) -> Crew:
    """A crew of three, however many cores there are."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    return Crew(CPU)


def test_only_a_cpu_has_a_crew(crew):
    assert crew.threads == 3
    assert Crew(torch.device("meta")).threads == 1


@pytest.mark.parametrize(
    ("items", "batch_size", "sizes"),
    [
        (range(0), 50, []),
        (range(7, 8), 50, [1]),  # fewer than SMALLEST for each
        (range(40), 50, [20, 20]),
        (range(64), 50, [21, 21, 22]),
        (range(5, 305), 50, [50] * 6),
        (range(350), 50, [38] + [39] * 8),  # seven are enough, nine are as many for each
        (range(7), 3, [2, 2, 3]),  # the batch size is kept
        (range(4), 1, [1] * 4),
    ],
)
def test_there_are_as_many_batches_for_each_thread(crew, items, batch_size, sizes):
    parts = crew.split(items, batch_size)
    assert [len(part) for part in parts] == sizes
    assert [i for part in parts for i in part] == list(items)


def test_the_threads_of_many_cores_are_divided(monkeypatch):
    """Eight batches at a time, of two threads each; with fewer batches each has more."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    told = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    crew = Crew(CPU)
    assert len(crew.split(range(10**4), 50)) == 200
    few = crew.split(range(2 * SMALLEST), 50)
    for batches, each in ([range(1)] * MOST, 2), ([range(1)] * 50, 2), (few, 8):
        list(crew.map(lambda _: time.sleep(0.05), batches))
        assert set(told) == {each}
        told.clear()


def test_results_come_in_order_whichever_ends_first(crew):
    def make(batch):
        time.sleep(0.05 * (3 - batch.start))
        return 10 * batch.start

    assert list(crew.map(make, THREE)) == [0, 10, 20]


def test_batches_run_side_by_side_each_with_one_thread():
    before, here = torch.get_num_threads(), []

    def make(batch):
        here.append(batch)
        while len(here) < 3:  # for ever, if they ran one after the other
            time.sleep(0.001)
        return threads()

    def threads():
        return torch.__config__.parallel_info().split("at::get_num_threads() : ")[1].split()[0]

    try:
        torch.set_num_threads(3)
        assert threads() == "3"
        assert list(Crew(CPU).map(make, THREE)) == ["1"] * 3
        assert threads() == "3"
    finally:
        torch.set_num_threads(before)


def test_no_count_is_lost(crew):
    total = 0

    def progress(n):
        nonlocal total
        before = total
        time.sleep(1e-4)  # here another thread comes
        total = before + n

    def make(_):
        for _ in range(100):
            crew.report(progress, 2)

    list(crew.map(make, THREE))
    assert total == 3 * 100 * 2


def test_few_results_wait_for_the_caller():
    """Else the images of a slow writer would fill the memory."""
    begun = count()
    with ThreadPoolExecutor(2) as pool:
        made = results(pool, lambda _: next(begun), THREE * 100, ahead=4)
        next(made)
        time.sleep(0.1)
        assert next(begun) == 5
        assert len(list(made)) == 299


def test_when_the_caller_stops_the_others_stop_at_their_next_report(crew):
    stopped = []

    def make(batch):
        if not batch.start:
            return batch
        try:
            while True:
                crew.report(lambda _: None, 1)
                time.sleep(0.001)
        except CancelledError:
            stopped.append(batch)
            raise

    with pytest.raises(KeyboardInterrupt):
        for _ in crew.map(make, THREE * 30):
            raise KeyboardInterrupt
    assert len(stopped) <= 3  # the others did not begin


def test_an_error_of_one_is_the_error_of_all(crew):
    def make(batch):
        if not batch.start:
            raise ValueError("the first")
        while True:
            crew.report(lambda _: None, 1)

    with pytest.raises(ValueError, match="the first"):
        list(crew.map(make, THREE))
