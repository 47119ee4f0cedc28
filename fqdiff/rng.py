"""Labelled, seeded generators: each use of randomness has its own stream, whoever calls first."""

import hashlib

import torch


def derive_seed(seed: int, *labels: str | int) -> int:
    """A 63-bit seed for one labelled use of ``seed``.

    ``derive_seed(0, "fisher", 17)`` depends on nothing but its arguments, so batch size, worker count and the order of
    calls cannot change a random number.
    """
    text = repr((int(seed), *labels)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def generator(seed: int, *labels: str | int) -> torch.Generator:
    """A CPU generator seeded with :func:`derive_seed`; draw on the CPU, then move the numbers to the device."""
    return torch.Generator().manual_seed(derive_seed(seed, *labels))
