"""One batched backward pass that hands out the gradient of every single sample, layer by layer.

Parameters are frozen meanwhile, so that autograd keeps only what the gradients of the layers' outputs need. Each layer's own
gradients are made when its turn comes, a few samples at a time, and gone before the next: never B copies of all parameters.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fqdiff.errors import ConfigError, NumericalError
from fqdiff.fisher.rules import Gradients, Pieces, per_sample

OnParameter = Callable[[str, Pieces], None]  # parameter name, gradients [b, *shape] piece by piece, to be used up
OnOutput = Callable[[str, Tensor], None]  # layer name, gradients of its output [B, ...]


def ignore(name: str, gradients: Tensor) -> None:
    """The default for what nobody asked for."""


def layers(network: nn.Module) -> dict[str, nn.Module]:
    """Modules with parameters of their own, by name. nn.MultiheadAttention is one layer: its children are never called."""
    found: dict[str, nn.Module] = {}
    for name, module in network.named_modules():
        inside = any(isinstance(m, nn.MultiheadAttention) and name.startswith(f"{n}.") for n, m in found.items())
        if not inside and next(module.parameters(recurse=False), None) is not None:
            found[name] = module
    return found


def per_sample_backward(
    network: nn.Module,
    forward: Callable[[], Tensor],
    cotangent: Callable[[Tensor], Tensor],
    on_parameter: OnParameter,
    on_output: OnOutput = ignore,
) -> Tensor:
    """The result y [B, ...] of ``forward()``, which calls ``network`` once on a batch, after its backward pass.

    For each sample b, ``on_parameter`` gets the gradient of sum(cotangent(y)[b] * y[b]) for every parameter, and ``on_output``
    that for the output of every layer. Samples must not meet inside the network (no batch statistics: use eval mode).
    Raises NumericalError where a parameter gets no gradient, ConfigError for a layer that does not keep the batch axis first.
    """
    collector = _Collector(on_parameter, on_output)
    with collector.watching(network), torch.enable_grad():
        result = forward()
        collector.batch = len(result)
        torch.autograd.backward(result, cotangent(result.detach()))
    missing = [name for name, _ in network.named_parameters() if name not in collector.given]
    if missing:
        raise NumericalError(
            f"no gradient reached '{missing[0]}'" + (f" and {len(missing) - 1} others" if len(missing) > 1 else ""),
            "the network must use every parameter inside the module that holds it, and change no layer's output in place",
        )
    return result.detach()


class _Collector:
    """Inputs of layers on the way forward; gradients of parameters on the way back."""

    def __init__(self, on_parameter: OnParameter, on_output: OnOutput) -> None:
        self.on_parameter, self.on_output = on_parameter, on_output
        self.batch = 0
        self.calls: dict[str, int] = {}  # calls of a layer whose gradients are still to come
        self.waiting: dict[str, list[Gradients]] = {}  # of layers called several times, until all are there
        self.given: set[str] = set()
        self.busy = False  # while a rule runs a module again

    @contextmanager
    def watching(self, network: nn.Module) -> Iterator[None]:
        """Hooks on every layer of ``network``, its parameters frozen, for as long as it lasts."""
        needed = {p: p.requires_grad for p in network.parameters()}
        handles = [
            module.register_forward_hook(self._forward_hook(name), with_kwargs=True)
            for name, module in layers(network).items()
        ]
        try:
            network.requires_grad_(False)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter, requires in needed.items():
                parameter.requires_grad_(requires)

    def _forward_hook(self, name: str) -> Callable[..., object]:
        def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> object:
            if self.busy:
                return None
            inputs, first, others = _taken_apart(name, module, args, kwargs, output)
            if not first.requires_grad:  # nothing before it does: the first convolution, a time embedding
                first = first.detach().requires_grad_(True).clone()  # no leaf, so that it may be changed in place
            versions = tuple(v._version for v in inputs)
            self.calls[name] = self.calls.get(name, 0) + 1

            def backward(gradient: Tensor) -> None:
                if any(v._version != version for v, version in zip(inputs, versions, strict=True)):
                    raise ConfigError(f"the input of layer '{name}' was changed in place", "use a copy in the network")
                self.busy = True
                with torch.no_grad():
                    self._collect(name, module, inputs, gradient.detach(), kwargs)
                self.busy = False

            first.register_hook(backward)
            return (first, *others) if isinstance(output, tuple) else first

        return hook

    def _collect(
        self,
        name: str,
        module: nn.Module,
        inputs: tuple[Tensor, ...],
        gradient: Tensor,
        options: Mapping[str, object],
    ) -> None:
        for what in (*inputs, gradient):
            if len(what) != self.batch:
                raise ConfigError(
                    f"layer '{name}' works on a first axis of {len(what)}, not on the batch of {self.batch}",
                    "per-sample gradients need the batch as the first axis of every layer",
                )
        self.on_output(name, gradient)
        self.waiting.setdefault(name, []).append(per_sample(module, inputs, gradient, options))
        self.calls[name] -= 1
        if self.calls[name]:
            return
        found = self.waiting.pop(name)
        for parameter in found[0]:
            full = f"{name}.{parameter}" if name else parameter
            self.given.add(full)
            self.on_parameter(full, _summed([gradients[parameter] for gradients in found]))


def _taken_apart(
    name: str, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], output: object
) -> tuple[tuple[Tensor, ...], Tensor, tuple[object, ...]]:
    """Inputs, first output and other outputs of one call. Raises ConfigError where its samples could not be told apart.

    A gradient for another output would be one that nobody counts; it raises the same, on the way back.
    """
    outputs = output if isinstance(output, tuple) else (output,)
    inputs = tuple(v.detach() for v in args if isinstance(v, Tensor))
    first = outputs[0]
    plain = len(inputs) == len(args) and not any(isinstance(v, Tensor) for v in kwargs.values())
    if not plain or not isinstance(first, Tensor) or getattr(module, "batch_first", True) is False:
        raise ConfigError(
            f"the call of layer '{name}' cannot be taken apart into samples",
            "pass tensors by position, all else by name, the batch as the first axis, and return a tensor",
        )

    def refuse(gradient: Tensor) -> None:
        raise ConfigError(f"the network uses more than the first output of layer '{name}'", "return a single tensor")

    def watched(value: object) -> object:
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value if value.requires_grad else value.detach().requires_grad_(True)
            value.register_hook(refuse)
        return value

    return inputs, first, tuple(watched(v) for v in outputs[1:])


def _summed(calls: list[Pieces]) -> Pieces:
    """Pieces of the sum over ``calls``, which cut the samples alike."""
    if len(calls) == 1:
        return calls[0]
    return (torch.stack(parts).sum(dim=0) for parts in zip(*calls, strict=True))
