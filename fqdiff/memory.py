"""How much memory some work takes: counted by following every tensor that a torch function returns, on any device."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that tensors made by ``work()`` take at any one time; what functions use inside is not seen."""
    living = _Living()
    with living:
        work()
    return living.peak


class _Living(TorchFunctionMode):
    """Bytes of tensors made within it that are alive, and the most that ever were.

    A dispatch mode would see inside of functions, but brings in 70 MiB of modules that sampling has no other use for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self.known: set[int] = set()  # addresses of storages that are counted

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in self.known | given:
                storage = value.untyped_storage()
                self.known.add(storage.data_ptr())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage.data_ptr(), storage.nbytes())
        return result

    def _freed(self, address: int, count: int) -> None:
        self.known.discard(address)
        self.now -= count
