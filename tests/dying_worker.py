"""A worker for the tests of processes, in a module that a fresh process imports at once."""

import os
from multiprocessing.connection import Connection


def fail_at_two(connection: Connection, word: str) -> None:
    while (number := connection.recv()) is not None:
        if number == 2:
            os._exit(3)
        connection.send((word, number))
