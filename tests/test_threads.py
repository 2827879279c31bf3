"""lab/threads.py: batches side by side."""

import time
from concurrent.futures import CancelledError

from lab.threads import Crew

import pytest
import torch

CPU = torch.device("cpu")


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
    [(10, 2, [2] * 5), (10, 100, [4, 4, 2]), (2, 100, [1, 1]), (1, 100, [1])],
)
def test_there_is_a_batch_for_each_thread(crew, items, batch_size, sizes):
    assert [len(batch) for batch in crew.split(torch.arange(items), batch_size)] == sizes


def test_results_come_in_order_whichever_ends_first(crew):
    def make(batch):
        time.sleep(0.05 * (3 - batch.item()))
        return 10 * batch

    batches = torch.arange(3).split(1)
    assert torch.cat(list(crew.map(make, batches))).tolist() == [0, 10, 20]


def test_batches_run_side_by_side_each_with_one_thread(crew):
    here = []

    def make(batch):
        here.append(batch)
        while len(here) < 3:  # for ever, if they ran one after the other
            time.sleep(0.001)
        return torch.tensor(torch.__config__.parallel_info().count("at::get_num_threads() : 1"))

    before = torch.__config__.parallel_info()
    assert list(crew.map(make, torch.arange(3).split(1))) == [1, 1, 1]
    assert torch.__config__.parallel_info() == before


def test_no_count_is_lost(crew):
    counts = []

    def make(batch):
        for _ in range(1000):
            crew.report(lambda n: counts.append((counts[-1] if counts else 0) + n), 2)
        return batch

    list(crew.map(make, torch.arange(3).split(1)))
    assert counts[-1] == 3 * 1000 * 2


def test_when_the_caller_stops_the_others_stop_at_their_next_report(crew):
    stopped = []

    def make(batch):
        if not batch:
            return batch
        try:
            while True:
                crew.report(lambda _: None, 1)
                time.sleep(0.001)
        except CancelledError:
            stopped.append(batch.item())
            raise

    with pytest.raises(KeyboardInterrupt):
        for _ in crew.map(make, torch.arange(100).split(1)):
            raise KeyboardInterrupt
    assert len(stopped) <= 3  # the others did not begin


def test_an_error_of_one_is_the_error_of_all(crew):
    def make(batch):
        if not batch:
            raise ValueError("the first")
        while True:
            crew.report(lambda _: None, 1)

    with pytest.raises(ValueError, match="the first"):
        list(crew.map(make, torch.arange(3).split(1)))
