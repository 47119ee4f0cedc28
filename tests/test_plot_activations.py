"""Pictures of activations: quantiles are numpy's, groups are those of the timesteps, files are the same every time."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fqdiff.calibration.activations import timestep_groups
from fqdiff.rng import generator
from fqdiff.viz.activations import (
    SiteNumbers,
    SkipNumbers,
    box_statistics,
    boxes_over_time,
    histograms_over_time,
    skip_channels,
)
from fqdiff.viz.figures import render
from tests.test_cli import call, good
from tests.test_plots import words


def numbers(*shape: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    found: np.ndarray[Any, np.dtype[np.float64]] = torch.randn(*shape, generator=generator(0, "plot")).double().numpy()
    return found


def test_a_box_has_numpys_quantiles_and_the_exact_extremes() -> None:
    x = numbers(1000)
    box = box_statistics(x, -9.0, 11.0)
    ordered = np.sort(x)
    for name, share in (("whislo", 0.01), ("q1", 0.25), ("med", 0.5), ("q3", 0.75), ("whishi", 0.99)):
        at = share * 999
        low, high = ordered[int(at)], ordered[int(at) + 1]
        assert box[name] == low + (at - int(at)) * (high - low)
    assert box["fliers"] == [-9.0, 11.0]


def test_groups_hold_neighbouring_timesteps_from_noise_to_image() -> None:
    index, means = timestep_groups(torch.tensor([999, 999, 700, 400, 400, 400, 10]), 2)
    assert index.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert means.tolist() == [(999 * 2 + 700) / 3, (400 * 3 + 10) / 4]
    index, means = timestep_groups(torch.tensor([5, 9, 5]), 10)
    assert index.tolist() == [1, 0, 1]
    assert means.tolist() == [9, 5]


def test_pictures_name_every_site_and_do_not_change() -> None:
    low, high = np.array([-5.0, -6.0, -7.0]), np.array([5.0, 6.0, 7.0])
    sites = {f"block{i}.$x$": SiteNumbers([numbers(50 + k) for k in range(3)], low, high) for i in range(8)}
    timesteps = np.array([900.0, 500.0, 20.0])
    skip = {"head.late": SkipNumbers(numbers(6, 40), numbers(6) - 5, numbers(6) + 5, 4)}
    for draw in (
        lambda: boxes_over_time(sites, timesteps, "calibration 0"),
        lambda: histograms_over_time(sites, timesteps, "calibration 0"),
    ):
        svg = render(draw(), "svg")
        assert svg == render(draw(), "svg")
        assert {f"block{i}.$x$" for i in range(8)} <= set(words(svg))
    title = next(w for w in words(render(skip_channels(skip, "calibration 0"), "svg")) if w.startswith("head.late"))
    joined, skipped = numbers(6)[:4], numbers(6)[4:]
    assert title == (
        f"head.late: decoder {joined.min() - 5:.3g} to {joined.max() + 5:.3g}, "
        f"skip {skipped.min() - 5:.3g} to {skipped.max() + 5:.3g}"
    )


def test_constant_numbers_are_drawn() -> None:
    flat = SiteNumbers([np.zeros(5)], np.zeros(1), np.zeros(1))
    for draw in (boxes_over_time, histograms_over_time):
        assert render(draw({"a": flat}, np.array([3.0]), "x"), "svg")


def test_the_command_draws_and_says_where(tmp_path: Path) -> None:
    store = tmp_path / "store"
    good(store, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "5", "--name", "one")
    assert call(store, "plot", "activations").exit_code == 1
    good(store, "calibrate", "--steps", "4", "--timesteps", "3", "--samples", "2")
    few = ("--site", "head.late", "--site", "block2.attention.softmax", "--format", "svg")
    made: Any = good(store, "plot", "activations", *few, "--groups", "2")
    assert [Path(f).name for f in made["files"]] == ["boxes.svg", "histograms.svg", "skips.svg"]
    shown = words(Path(made["files"][0]).read_bytes())
    assert {"head.late", "block2.attention.softmax"} <= set(shown)
    assert "stem.conv" not in shown
    folder = tmp_path / "all"
    all_sites: Any = good(
        store, "plot", "activations", "--picture", "boxes", "--format", "svg", "--output", str(folder)
    )
    assert [Path(f).name for f in all_sites["files"]] == ["boxes.svg"]
    assert {"stem.conv", "output", "block6.attention.key"} <= set(words((folder / "boxes.svg").read_bytes()))
    for arguments, message in (
        (("--site", "nowhere"), "no site is called 'nowhere'"),
        (("--picture", "pie"), "unknown picture 'pie'"),
        (("--site", "output", "--picture", "skips"), "joined skip"),
    ):
        refused = call(store, "plot", "activations", *arguments)
        assert refused.exit_code == 2
        assert message in refused.stderr
