"""Several threads, each with a network of its own that shares the weights, each computing on one core.

A batched pass on two cores is not twice as quick as on one: single operations are too small to be cut well. Two batches side
by side are. It also makes results independent of the number of threads.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TypeVar

import torch
from torch import nn

Task = TypeVar("Task")
Result = TypeVar("Result")


class Workers:
    """``map(work, tasks)``: results of ``work(network, task)`` in the order of ``tasks``, several at a time."""

    def __init__(self, networks: Sequence[nn.Module], pool: ThreadPoolExecutor) -> None:
        self.free: SimpleQueue[nn.Module] = SimpleQueue()
        for network in networks:
            self.free.put(network)
        self.count, self.pool = len(networks), pool

    def map(self, work: Callable[[nn.Module, Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """Results in order; an error stops what has not begun."""

        def run(task: Task) -> Result:
            torch.set_num_threads(1)  # of this thread alone
            network = self.free.get()
            try:
                return work(network, task)
            finally:
                self.free.put(network)

        waiting: list[Future[Result]] = []
        try:
            for task in tasks:
                waiting.append(self.pool.submit(run, task))
                if len(waiting) > 2 * self.count:  # results are large: do not run far ahead of who takes them
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def workers(make_network: Callable[[], nn.Module], device: torch.device) -> Iterator[Workers]:
    """One worker for each thread that torch may use on a CPU; one in all on other devices, which are parallel inside."""
    threads = torch.get_num_threads()
    count = threads if device.type == "cpu" else 1
    networks = [
        make_network().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        for _ in range(count)
    ]
    with ThreadPoolExecutor(count) as pool:
        try:
            yield Workers(networks, pool)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
