"""Threads: several batches at a time on a CPU."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from threading import Lock

import torch
from torch import Tensor


class Crew:
    """Threads that each make a batch of their own.

    On a CPU there are as many as torch has, and each computes alone. So no thread waits for the
    others at the end of every operation: two threads then make a quarter more images than with one
    batch at a time. On any other device the caller's thread makes one batch after the other.
    """

    def __init__(self, device: torch.device):
        self.threads = torch.get_num_threads() if device.type == "cpu" else 1
        self._lock, self._is_over = Lock(), False

    def split(self, items: Tensor, batch_size: int) -> tuple[Tensor, ...]:
        """Return batches of at most this size, at least one for each thread if there are enough."""
        return items.split(max(min(batch_size, -(-len(items) // self.threads)), 1))

    def map(self, make: Callable[[Tensor], Tensor], batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield make(batch) for each batch, in their order.

        If the caller stops before the end, for example by Ctrl-C, the other threads stop at their
        next `report`.
        """
        if self.threads == 1:
            yield from map(make, batches)
            return
        with ThreadPoolExecutor(self.threads, "crew", torch.set_num_threads, (1,)) as pool:
            try:
                yield from pool.map(make, batches)
            except BaseException:
                self._is_over = True
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
