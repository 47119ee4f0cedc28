"""Squares of per-sample gradients, summed and reduced to what a Fisher table keeps.

Shapes: B samples of one batch, which belong to G timesteps; S samples of one timestep; N sampler runs; O output channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fqdiff.fisher.rules import Pieces

SMALL = 2**16  # elements that are squared all at once: for more, new memory costs more than the squares


@dataclass(frozen=True)
class Squares:
    """Squared gradients of one tensor, on the CPU.

    ``elements`` [G, *shape]: summed over the samples of each timestep, float32 where they come from one batch, else float64.
    ``samples`` [B], float64: summed over the elements.
    """

    elements: Tensor
    samples: Tensor


@dataclass(frozen=True)
class Rows:
    """What a table keeps of one tensor at G timesteps: ``mean``, ``standard_error``, ``maximum`` [G], ``channel`` [G, O]."""

    mean: Tensor
    standard_error: Tensor
    maximum: Tensor
    channel: Tensor


def squares(pieces: Pieces, groups: int, batch: int) -> Squares:
    """Sums of squares of the gradients of ``batch`` samples, an equal number for each of ``groups`` timesteps in turn.

    Within one batch squares are summed in float32 (at most B of them), all sums over batches and timesteps in float64.
    """
    each = batch // groups
    elements: Tensor | None = None
    norms: list[Tensor] = []
    begin = 0
    for piece in pieces:
        piece = piece.float()
        # One more axis: a parameter may be a single number, and no axes at all would mean all of them.
        norms.append(torch.linalg.vector_norm(piece[..., None], dim=tuple(range(1, piece.ndim + 1))))
        if len(piece) == batch and piece.numel() <= SMALL:
            elements = piece.square().unflatten(0, (groups, each)).sum(dim=1)
            break
        if elements is None:
            elements = _zeros_laid_out_as(piece, groups)
        for k in range(begin // each, (begin + len(piece) - 1) // each + 1):
            part = piece[max(k * each - begin, 0) : (k + 1) * each - begin]
            for gradient in part:
                elements[k].addcmul_(gradient, gradient)
        begin += len(piece)
    assert elements is not None
    return Squares(elements.cpu(), torch.cat(norms).cpu().double().square())


def _zeros_laid_out_as(piece: Tensor, groups: int) -> Tensor:
    """Zeros [G, *shape], each laid out in memory as the gradients are, or adding them would be several times slower."""
    strides = (piece[0].numel(), *torch.empty_like(piece[0]).stride())
    return torch.zeros(groups * piece[0].numel(), device=piece.device).as_strided((groups, *piece.shape[1:]), strides)


def added(parts: Sequence[Squares]) -> Squares:
    """Squares of the batches of one timestep, G = 1, as those of one batch."""
    if len(parts) == 1:
        return parts[0]
    elements = torch.stack([p.elements.double() for p in parts]).sum(dim=0)
    return Squares(elements, torch.cat([p.samples for p in parts]))


def rows(found: Squares, scale: Tensor, axis: int, pairs: bool) -> Rows:
    """Mean squares and their standard errors; ``scale`` [G], float64, multiplies the gradients of each timestep.

    ``axis`` of a gradient counts output channels. With ``pairs`` samples 2 k and 2 k + 1 are antithetic: their mean is one
    observation.
    """
    count = len(found.samples) // len(scale)
    squared = scale.square()
    each = found.samples.view(len(scale), count) / found.elements[0].numel()
    if pairs:
        each = each.view(len(scale), -1, 2).mean(dim=2)
    error = each.std(dim=1) / each.shape[1] ** 0.5
    # One more axis here, too.
    maximum = found.elements[..., None].amax(dim=tuple(range(1, found.elements.ndim + 1))).double() / count
    channel = channel_means(found.elements, axis).double() / count
    return Rows(each.mean(dim=1) * squared, error * squared, maximum * squared, channel * squared[:, None])


def channel_means(values: Tensor, axis: int) -> Tensor:
    """[G, *shape] -> [G, O]: mean over all but the first axis and ``axis`` of shape (-1: the last)."""
    if values.ndim <= 2:
        return values.reshape(len(values), -1)
    keep = values.ndim - 1 if axis < 0 else axis + 1
    return values.mean(dim=[k for k in range(1, values.ndim) if k != keep])


def robust_weights(norms: Tensor) -> Tensor:
    """Weights [N] of sampler runs: sum_n w_n g_n^2 is the geometric mean of ``norms`` times the mean of g_n^2 / norm_n.

    ``norms`` [N]: squared gradient of each run, summed over all parameters. They span decades (chaotic trajectories), so that
    a plain mean is one or two runs; here each run has one vote on how the total is shared out (docs/concepts.md).
    """
    return norms.log().mean().exp() / (len(norms) * norms)


def jackknife_error(values: Tensor, norms: Tensor) -> Tensor:
    """Standard error of sum_n w_n values[n], float64 [N, ...] -> [...], with one run left out at a time (Efron 1982)."""
    count = len(norms)
    kept = [torch.arange(count) != n for n in range(count)]
    left_out = torch.stack([torch.einsum("n,n...->...", robust_weights(norms[k]), values[k]) for k in kept])
    return ((count - 1) / count * (left_out - left_out.mean(dim=0)).square().sum(dim=0)).sqrt()
