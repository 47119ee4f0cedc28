"""The picture of a training run."""

import numpy as np
from torch import Tensor


def loss_curve(loss: Tensor, title: str) -> bytes:
    """PNG of the training loss: every step faint, a running mean over 1 % of the steps on top."""
    from fqdiff.viz.figures import despine, new_figure, render  # matplotlib: not for every command that reads a store

    values = loss.numpy()
    window = max(1, len(values) // 100)
    figure = new_figure(7, 4)
    axes = figure.add_subplot()
    steps = np.arange(1, len(values) + 1)
    axes.plot(steps, values, color="#9ecae1", linewidth=0.5, label="each step")
    smooth = np.convolve(values, np.ones(window) / window, mode="valid")
    axes.plot(steps[window - 1 :], smooth, color="#08519c", linewidth=1.5, label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="mean squared error", title=title, yscale="log")
    axes.legend(frameon=False)
    despine(axes)
    return render(figure, "png")
