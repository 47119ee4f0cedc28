"""The scores that others plan precisions by, each as published but for the loss, which here is the diffusion model's own.

Larger is meant to be worse. The loss of an input is l = 1/2 sum over pixels (noise - eps_pred)^2.
Shapes: B inputs, K candidates.
"""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fqdiff.errors import NumericalError
from fqdiff.rng import generator
from fqdiff.sensitivity.inputs import Inputs
from fqdiff.sensitivity.measure import replaced

SETTLED = 1e-3  # relative change of the mean that ends Hutchinson's draws
Quantized = Mapping[str, Iterable[tuple[int, Tensor]]]  # tensor -> (candidate, its weight) of each of its candidates


def weight_mse(weight: Tensor, quantized: Tensor) -> float:
    """Mean squared weight error: what PTQ4DM's and Q-Diffusion's range searches minimise."""
    return float((quantized.double() - weight.double()).square().mean())


def mean_magnitude(weight: Tensor) -> float:
    """Mean |w|, the same for every format: magnitude as importance, as in pruning (Han et al. 2015, arXiv:1506.02626)."""
    return float(weight.double().abs().mean())


def _losses(network: nn.Module, inputs: Inputs) -> Tensor:
    """l of each input, [B]."""
    error: Tensor = inputs.weight * (inputs.target - network(inputs.x_t, inputs.t))
    return 0.5 * error.square().flatten(1).sum(dim=1)


def hessian_trace(
    network: nn.Module, name: str, inputs: Inputs, device: torch.device, seed: int, most_draws: int
) -> float:
    """Hutchinson's estimate of the trace of the Hessian block of one tensor: mean of v^T (H v) over Rademacher draws of v.

    HAWQ-V2 (Dong et al. 2020, arXiv:1911.03852), H that of the mean loss, by a second backward pass; it stops as PyHessian
    does, where a draw moves the mean by less than a thousandth. Tensor by tensor: one draw for all of them at once is far
    cheaper, but the products with the other blocks are noise that drowns small traces, some of them to below zero.
    """
    weight = dict(network.named_parameters())[name]
    draws: list[float] = []
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no second derivative
        gradient = torch.zeros_like(weight)
        for part in inputs.chunks():
            part = part.to(device)
            loss = (_losses(network, part) * part.share.to(part.x_t)).sum()
            gradient = gradient + torch.autograd.grad(loss, weight, create_graph=True)[0]
        for number in range(most_draws):
            signs = torch.randint(0, 2, weight.shape, generator=generator(seed, "hutchinson", name, number))
            v = (signs * 2.0 - 1).to(weight)
            (product,) = torch.autograd.grad(gradient, weight, v, retain_graph=True, materialize_grads=True)
            draws.append(float((v * product).sum()))
            before, after = sum(draws[:-1]) / max(1, number), sum(draws) / len(draws)
            if number and abs(after - before) < SETTLED * (abs(before) + 1e-6):
                break
    return sum(draws) / len(draws)


def modelopt_scores(
    network: nn.Module, quantized: Quantized, inputs: Inputs, device: torch.device, count: int
) -> Tensor:
    """Sum over inputs and elements of (dl/dY * dY)^2, dY what quantizing a layer does to its output; float64 [count].

    NVIDIA ModelOpt's ``auto_quantize`` score. All formats in one backward pass. Per input, where theirs squares gradients of a
    batch's mean loss: the same but for the factor 1 / batch^2. To be added up over batches, for each of which candidates are
    gone through once.
    """
    scores = torch.zeros(count, dtype=torch.float64)
    hooks = []
    paths = dict.fromkeys(name.rpartition(".")[0] for name in quantized)
    twins = {path: copy.deepcopy(network.get_submodule(path)) for path in paths}  # without hooks
    for name, ways in quantized.items():
        path, _, parameter = name.rpartition(".")
        layer = network.get_submodule(path)

        def watch(
            module: nn.Module,
            args: tuple[Tensor, ...],
            output: Tensor,
            twin: nn.Module = twins[path],
            parameter: str = parameter,
            ways: Iterable[tuple[int, Tensor]] = ways,
        ) -> None:
            arguments, plain = tuple(a.detach() for a in args), output.detach()

            def score(gradient: Tensor) -> None:
                for k, weight in ways:
                    with torch.no_grad():
                        change = functional_call(twin, {parameter: weight.to(device)}, arguments) - plain
                        per_input = (gradient * change).square().flatten(1).sum(dim=1)
                    scores[k] += per_input.cpu().double() @ inputs.share

            output.register_hook(score)

        hooks.append(layer.register_forward_hook(watch))
    try:
        _losses(network, inputs.to(device)).sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
        network.zero_grad(set_to_none=True)
    return scores


def autoround_scores(
    network: nn.Module, option: Mapping[str, tuple[int, Tensor]], inputs: Inputs, device: torch.device
) -> dict[int, float]:
    """Sum |dL/dw * (w - Q(w))| of each candidate in ``option``, one per tensor, L the mean loss with all of them in place.

    AutoRound's AutoScheme (Intel, 2025): gradients at the quantized weights, one backward pass per format.
    """
    parameters = dict(network.named_parameters())
    originals = {name: parameters[name].detach().clone() for name in option}
    with replaced(network, {name: weight for name, (_, weight) in option.items()}):
        for part in inputs.chunks():
            part = part.to(device)
            (_losses(network, part) * part.share.to(part.x_t)).sum().backward()
        gradients = {name: parameters[name].grad for name in option}
        network.zero_grad(set_to_none=True)
    scores = {}
    for name, (k, weight) in option.items():
        gradient = gradients[name]
        if gradient is None:
            raise NumericalError(f"no gradient reached '{name}'", "the network must use every parameter")
        scores[k] = float((gradient * (originals[name] - weight.to(device))).abs().sum())
    return scores
