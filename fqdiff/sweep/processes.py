"""Numbered jobs in several processes: one that dies takes no other with it, and an interrupt lets all of them stop well."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any


@dataclass(frozen=True)
class Died:
    """What stands for the result of a job whose process ended; ``exit_code`` is negative for a signal."""

    exit_code: int | None


def run_in_processes(
    numbers: Sequence[int], jobs: int, worker: Callable[..., None], arguments: tuple[Any, ...]
) -> Iterator[tuple[int, Any]]:
    """(number, result) of every one of ``numbers``, as they finish, up to ``jobs`` at a time.

    ``worker(connection, *arguments)`` runs in a fresh process: it receives a number, sends a result, and so on until it
    receives None. Ctrl-C reaches it as SIGTERM alone: a terminal sends SIGINT to all at once, and twice means at once.
    """
    context = multiprocessing.get_context("spawn")
    waiting, busy = deque(numbers), dict[Connection, tuple[BaseProcess, int]]()
    started: list[BaseProcess] = []

    def start() -> tuple[Connection, BaseProcess]:
        ours, theirs = context.Pipe()
        process = context.Process(target=worker, args=(theirs, *arguments), daemon=True)
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited
        try:
            process.start()
        finally:
            signal.signal(signal.SIGINT, before)
        theirs.close()  # so that the end of the process ends the connection
        started.append(process)
        return ours, process

    def give(connection: Connection, process: BaseProcess) -> None:
        number = waiting.popleft()
        busy[connection] = process, number
        with suppress(OSError):  # it died: waiting for its result tells
            connection.send(number)

    try:
        for _ in range(min(jobs, len(waiting))):
            give(*start())
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                process, number = busy.pop(ready)
                try:
                    result = ready.recv()
                except (EOFError, OSError):
                    process.join()
                    result = Died(process.exitcode)
                if waiting:
                    give(*(start() if isinstance(result, Died) else (ready, process)))
                elif not isinstance(result, Died):
                    with suppress(OSError):
                        ready.send(None)
                yield number, result
    finally:
        _end(started, bool(busy))


def _end(processes: Sequence[BaseProcess], asked: bool) -> None:
    """Wait for all to end, once ``asked`` to stop what they do; a second Ctrl-C ends them at once."""
    try:
        for process in processes:
            if asked:
                process.terminate()
        for process in processes:
            process.join()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
        raise
