"""Inception score (Salimans et al. 2016, arXiv:1606.03498): exp of the mean KL divergence between p(y|x) and p(y).

With the digits classifier it runs from 1 to the number of classes: sure of each image, and all classes equally often.
Shapes: N images, K classes, R resamples.
"""

import torch
from torch import Tensor


def inception_score(probabilities: Tensor) -> float:
    """The score of ``probabilities`` [N, K], over all images at once and not in ten splits: fewer images, less bias."""
    once = torch.ones(1, len(probabilities), dtype=torch.int32, device=probabilities.device)
    return float(inception_score_draws(probabilities, once))


def inception_score_draws(probabilities: Tensor, counts: Tensor) -> Tensor:
    """The score in each resample of ``counts`` [R, N]; float64 [R]. KL averages to H(mean p) - mean H(p)."""
    p, weights = probabilities.double(), counts.double() / counts.sum(dim=1, keepdim=True)
    marginal = weights @ p
    scores: Tensor = (torch.special.entr(marginal).sum(dim=1) - weights @ torch.special.entr(p).sum(dim=1)).exp()
    return scores
