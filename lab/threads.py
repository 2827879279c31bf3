"""Threads: several batches at a time on a CPU."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from threading import Lock

from lab.distributed import share

import torch
from torch import Tensor

# Between two operations a thread needs Python, which runs one thread at a time. So there must not
# be too many threads, and a batch must not be too small.
MOST = 8  # batches at a time
SMALLEST = 16  # images of a batch


class Crew:
    """Threads; each makes a different batch.

    On a CPU they divide torch's threads among them. So no thread waits for all others at the end of
    every operation: on 2 cores of an AMD EPYC, two batches with one thread each take 0.8 times as
    long as one after the other with two threads. On any other device one batch is made at a time.
    """

    def __init__(self, device: torch.device):
        self.threads = torch.get_num_threads() if device.type == "cpu" else 1
        self._lock, self._is_over = Lock(), False

    def split(self, items: range, batch_size: int) -> list[range]:
        """Return parts of nearly equal size, at most batch_size, and equally many for each thread.

        There are fewer parts where they would have less than SMALLEST items.
        """
        workers, needed = min(self.threads, MOST), math.ceil(len(items) / batch_size)
        n = max(needed, min(math.ceil(needed / workers) * workers, len(items) // SMALLEST))
        shares = (share(len(items), i, n) for i in range(n))
        return [items[part.start : part.stop] for part in shares]

    def map(self, make: Callable[[range], Tensor], batches: list[range]) -> Iterator[Tensor]:
        """Yield make(batch) for each batch, in their order.

        If the caller stops before the end, for example by Ctrl-C, the other threads stop at their
        next `report`.
        """
        workers = min(self.threads, MOST, len(batches))
        if workers < 2:
            yield from map(make, batches)
            return
        each = self.threads // workers
        with ThreadPoolExecutor(workers, "crew", torch.set_num_threads, (each,)) as pool:
            try:
                yield from results(pool, make, batches, ahead=2 * workers)
            except BaseException:
                self._is_over = True
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def report(self, progress: Callable[[int], None], n: int) -> None:
        """Call progress(n), in one thread at a time.

        Raises:
            CancelledError: the caller of `map` has stopped.
        """
        if self._is_over:
            raise CancelledError
        with self._lock:
            progress(n)


def results(
    pool: ThreadPoolExecutor, make: Callable, batches: Iterable, ahead: int
) -> Iterator[Tensor]:
    """Yield make(batch) for each batch, in their order. At most `ahead` wait for the caller."""
    waiting: deque[Future] = deque()
    for batch in batches:
        waiting.append(pool.submit(make, batch))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
