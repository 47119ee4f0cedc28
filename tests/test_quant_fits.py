"""Fitting grids to weights: codebooks, ranges, ternary scales, and SQuant's rounding."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from fqdiff.errors import ConfigError, QuantizationError
from fqdiff.quant.codebooks import fit_codebook, looked_up, nearest_entry
from fqdiff.quant.formats import FORMATS, Format, Granularity, PerChannel, PerGroup, PerTensor, get_format
from fqdiff.quant.packed import PackedTensor, check_values, pack_tensor, stored_bytes, unpack_tensor
from fqdiff.quant.qparams import ternary_scale
from fqdiff.quant.ranges import RANGES, fitted_qparams
from fqdiff.quant.rounding import squant


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(
    x: Tensor, fmt: Format, granularity: Granularity, span: str = "min-max", weight: Tensor | None = None
) -> float:
    back = unpack_tensor(pack_tensor(x, fmt, granularity, span, weight=weight))
    squares = (back.double() - x.double()).square()
    return float((squares if weight is None else squares * weight).sum())


# --- codebooks -------------------------------------------------------------------------------------------------------


def best_by_brute_force(row: Tensor, weight: Tensor, entries: int) -> float:
    """Least weighted squared error of any division of the sorted row into ``entries`` pieces: in one dimension, all there are."""
    order = row.argsort()
    row, weight = row[order].double(), weight[order].double()
    least = float("inf")
    for cuts in combinations(range(1, len(row)), entries - 1):
        pieces = list(zip((0, *cuts), (*cuts, len(row)), strict=True))
        means = [(weight[a:b] * row[a:b]).sum() / weight[a:b].sum() for a, b in pieces]
        sums = [float((weight[a:b] * (row[a:b] - m).square()).sum()) for (a, b), m in zip(pieces, means, strict=True)]
        least = min(least, sum(sums))
    return least


def test_codebooks_are_nearly_the_best_there_are() -> None:
    rows, weight = drawn(40, 12), drawn(40, 12, seed=1).exp()
    codebook = fit_codebook(rows, weight, 4)
    errors = (weight * (rows - looked_up(nearest_entry(rows, codebook), codebook)).square()).sum(dim=1)
    best = torch.tensor([best_by_brute_force(r, w, 4) for r, w in zip(rows, weight, strict=True)])
    assert bool((errors > best * (1 - 1e-4)).all())
    assert float(errors.sum() / best.sum()) < 1.25  # Lloyd's iterations end in a local optimum


def test_every_entry_is_the_weighted_mean_of_its_weights_so_that_errors_cancel() -> None:
    rows, weight = drawn(5, 400), drawn(5, 400, seed=1).exp()
    codebook = fit_codebook(rows, weight, 8)
    assert bool((codebook.diff(dim=1) >= 0).all())
    codes = nearest_entry(rows, codebook)
    drift = torch.zeros(5, 8).double().scatter_add_(1, codes, weight.double() * (rows - looked_up(codes, codebook)))
    assert float(drift.abs().max()) < 0.01 * float(weight.sum(dim=1).max())  # nearly so: the iterations are finite


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_codebook_errs_less_than_even_steps_and_survives_packing(bits: int) -> None:
    x = drawn(16, 8, 3, 3) ** 3
    fmt = get_format(f"codebook{bits}")
    packed = pack_tensor(x, fmt, PerChannel(0, torch.float16))
    assert sum(p.numel() * p.element_size() for p in packed.parts.values()) == stored_bytes(
        tuple(x.shape), fmt, PerChannel(0, torch.float16)
    )
    assert stored_bytes(tuple(x.shape), fmt, PerChannel(0, torch.float16)) == x.numel() * bits // 8 + 16 * 2**bits * 2
    back = unpack_tensor(packed)
    entries = packed.parts["codebook"].float()
    assert all(set(back[o].flatten().tolist()) <= set(entries[o].tolist()) for o in range(16))
    assert error(x, fmt, PerChannel(0)) < 0.8 * error(x, get_format(f"int{bits}"), PerChannel(0))
    # Each weight takes the nearest entry as it is stored.
    nearest = (x.flatten(1)[..., None] - entries[:, None]).abs().amin(dim=2)
    assert torch.allclose((back - x).flatten(1).abs(), nearest, atol=1e-6)


def test_codebooks_follow_transposed_convolutions_and_whole_tensors() -> None:
    x = drawn(6, 4, 4, 4)
    fmt = get_format("codebook3")
    by_column = unpack_tensor(pack_tensor(x, fmt, PerChannel(1)))
    turned = unpack_tensor(pack_tensor(x.movedim(1, 0).contiguous(), fmt, PerChannel(0))).movedim(0, 1)
    assert torch.equal(by_column, turned)
    assert len(unpack_tensor(pack_tensor(x, fmt, PerTensor())).unique()) <= 8


def test_weights_that_count_more_are_met_better() -> None:
    x, weight = drawn(4, 300), torch.ones(4, 300)
    weight[:, :20] = 1000
    fmt = get_format("codebook2")
    blind, seeing = (unpack_tensor(pack_tensor(x, fmt, PerChannel(0), s, weight=weight)) for s in ("min-max", "fisher"))
    assert float((seeing - x)[:, :20].square().sum()) < 0.7 * float((blind - x)[:, :20].square().sum())


@pytest.mark.parametrize("x", [torch.zeros(3, 10), torch.full((3, 10), 2.5), torch.tensor([[1.0, -1.0]] * 3)])
def test_rows_with_fewer_numbers_than_entries_are_exact(x: Tensor) -> None:
    assert torch.equal(unpack_tensor(pack_tensor(x, get_format("codebook4"), PerChannel(0))), x)


def test_a_codebook_of_numbers_that_overflow_is_refused() -> None:
    with pytest.raises(QuantizationError, match="codebook"):
        pack_tensor(torch.tensor([[1e6, 1.0]]), get_format("codebook2"), PerChannel(0, torch.float16))
    packed = pack_tensor(drawn(2, 8), get_format("codebook2"), PerChannel(0))
    broken = {**packed.parts, "codebook": packed.parts["codebook"] * float("nan")}
    with pytest.raises(QuantizationError, match="no numbers"):
        check_values(PackedTensor(packed.format, packed.granularity, packed.shape, broken))


# --- ranges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if f.is_integer], ids=lambda f: f.name)
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerGroup(12, 0)], ids=str)
def test_a_searched_range_never_errs_more_than_min_max_by_its_own_measure(
    fmt: Format, granularity: Granularity
) -> None:
    x, weight = drawn(8, 4, 3, 3) ** 3, drawn(8, 4, 3, 3, seed=1).exp()
    assert error(x, fmt, granularity, "mse") <= error(x, fmt, granularity) * (1 + 1e-6)
    by_fisher = error(x, fmt, granularity, "fisher", weight)
    assert by_fisher <= error(x, fmt, granularity, "mse", weight) * (1 + 1e-6)


def test_the_percentile_leaves_a_thousandth_outside_on_each_side() -> None:
    x = torch.linspace(-1, 1, 4001).view(1, -1)
    found = fitted_qparams(x, get_format("int8"), PerTensor(), "percentile")
    low = -float(found.zero_point) * float(found.scale)
    assert low == pytest.approx(-0.998, abs=0.006)
    assert low + 255 * float(found.scale) == pytest.approx(0.998, abs=0.006)


def test_fisher_ranges_need_fisher_values() -> None:
    with pytest.raises(ConfigError, match="without the values"):
        pack_tensor(drawn(2, 8), get_format("int4"), PerChannel(0), "fisher")


def test_ranges_are_all_different_on_weights_with_outliers() -> None:
    x = drawn(1, 3000)
    x[0, 0], x[0, 1] = 30.0, -12.0
    weight = torch.ones_like(x)
    weight[0, :2] = 1e4
    scales = [float(fitted_qparams(x, get_format("int4"), PerTensor(), span, weight).scale) for span in RANGES]
    assert len(set(scales)) == 4 - (scales[0] == scales[2])  # outliers that count keep the whole range
    assert scales[1] < 0.5 * scales[0]
    assert scales[2] > 0.9 * scales[0]


def test_a_weighted_ternary_scale_is_the_best_of_all() -> None:
    x, weight = drawn(6, 40), drawn(6, 40, seed=1).exp()
    found = ternary_scale(x, weight)
    tried = torch.linspace(0.01, 3, 600)

    def errors(s: Tensor) -> Tensor:
        codes = (x.abs() > s[:, None] / 2) * x.sign()
        return (weight * (x - s[:, None] * codes).square()).sum(dim=1)

    best = torch.stack([errors(s.expand(6)) for s in tried]).amin(dim=0)
    assert bool((errors(found.float()) <= best * (1 + 1e-6)).all())
    assert torch.equal(ternary_scale(x, torch.zeros_like(x)), ternary_scale(x))


# --- squant ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "inputs", "kernel"), [(20, 30, 9), (5, 1, 9), (7, 64, 16), (30, 3, 4)])
def test_squant_keeps_its_sums(channels: int, inputs: int, kernel: int) -> None:
    rows = 15 + 3 * drawn(channels, inputs * kernel)
    codes = squant(rows, kernel, 31)
    assert bool(((codes == rows.floor()) | (codes == rows.ceil())).all())
    errors = (codes - rows).double()
    assert float(errors.sum(dim=1).abs().max()) <= 0.5 + 1e-4
    by_kernel = errors.view(channels, inputs, kernel).sum(dim=2)
    assert float(by_kernel.abs().max()) < 1
    # Nearest rounding keeps neither.
    nearest = (rows.round() - rows).double()
    assert float(nearest.sum(dim=1).abs().max()) > 0.5


def test_squant_turns_only_those_kernels_again_that_their_channel_needs() -> None:
    rows = 15 + 3 * drawn(12, 40 * 9)
    one_kernel_each = squant(rows.view(-1, 9), 9, 31).view(12, -1)
    sums = (one_kernel_each - rows).view(12, 40, 9).sum(dim=2)
    assert float(sums.abs().max()) <= 0.5 + 1e-4  # a channel of one kernel: both sums at once
    turned = (squant(rows, 9, 31) != one_kernel_each).sum(dim=1)
    assert bool((turned <= sums.sum(dim=1).abs().round()).all())


def test_squant_of_kernels_of_one_weight_keeps_the_channels_sum() -> None:
    rows = 15 + 3 * drawn(9, 50)
    assert float((squant(rows, 1, 31) - rows).sum(dim=1).abs().max()) <= 0.5 + 1e-4


@pytest.mark.parametrize("fmt", ["int4", "int3sym"])
def test_squant_packs_and_keeps_the_channels_mean(fmt: str) -> None:
    x = drawn(16, 24, 3, 3)
    shift = {}
    for rounding in ("nearest", "squant"):
        packed = pack_tensor(x, get_format(fmt), PerChannel(0), rounding=rounding)
        back = unpack_tensor(packed)
        steps = (back - x) / packed.parts["scale"].abs().view(-1, 1, 1, 1)
        shift[rounding] = float(steps.sum(dim=(1, 2, 3)).abs().max())
        assert float(steps.abs().max()) < 1
    assert shift["squant"] <= 0.5 + 1e-3 < shift["nearest"]


def test_squant_makes_up_for_what_lies_beyond_the_range() -> None:
    rows = 4 + drawn(6, 30 * 9)
    rows[:, ::40] = 11.0
    codes = squant(rows, 9, 7)
    assert int(codes.max()) == 7
    assert float((codes - rows).sum(dim=1).abs().max()) <= 0.5 + 1e-4
    assert float((rows.round().clamp(0, 7) - rows).sum(dim=1).abs().min()) > 20


def test_squant_needs_a_scale_per_channel() -> None:
    with pytest.raises(ConfigError, match="squant with scales by group"):
        pack_tensor(drawn(4, 8, 3, 3), get_format("int4"), PerGroup(9, 0), rounding="squant")
