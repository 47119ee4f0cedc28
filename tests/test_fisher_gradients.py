"""The gradient of every single sample, layer by layer, against plain autograd in float64, one sample after the other."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fqdiff.errors import ConfigError, NumericalError
from fqdiff.fisher import rules
from fqdiff.fisher.backward import per_sample_backward
from fqdiff.fisher.moments import rows, squares

BATCH = 3
Inputs = tuple[Tensor, ...]


def normal(*shape: int) -> Tensor:
    return torch.randn(BATCH, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def indices(*shape: int) -> Tensor:
    return torch.randint(5, (BATCH, *shape), generator=torch.Generator().manual_seed(1))


def one_at_a_time(network: nn.Module, inputs: Inputs, cotangent: Tensor) -> dict[str, Tensor]:
    """Independent oracle: [B, *shape] for each parameter, by plain autograd."""
    found: dict[str, list[Tensor]] = {name: [] for name, _ in network.named_parameters()}
    for b in range(len(cotangent)):
        network.zero_grad()
        y = network(*(v[b : b + 1] for v in inputs))
        (y * cotangent[b : b + 1]).sum().backward()
        for name, p in network.named_parameters():
            assert p.grad is not None
            found[name].append(p.grad.clone())
    network.zero_grad()
    return {name: torch.stack(gradients) for name, gradients in found.items()}


def collected(network: nn.Module, inputs: Inputs, cotangent: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def collect(name: str, pieces: rules.Pieces) -> None:
        assert name not in found
        found[name] = torch.cat([piece.clone() for piece in pieces])

    per_sample_backward(network, lambda: network(*inputs), lambda y: cotangent.expand_as(y), collect)
    return found


def agree(network: nn.Module, *inputs: Tensor) -> None:
    """Both ways give the same gradients, for a random cotangent."""
    network.double()
    with torch.no_grad():
        shape = network(*inputs).shape[1:]
    cotangent = normal(*shape)
    expected, found = one_at_a_time(network, inputs, cotangent), collected(network, inputs, cotangent)
    assert found.keys() == expected.keys()
    for name, gradients in expected.items():
        assert found[name].shape == gradients.shape, name
        torch.testing.assert_close(found[name], gradients, rtol=1e-9, atol=1e-11, msg=name)


class Within(nn.Module):
    """``layer`` in the middle of a network: what reaches it depends on weights, what leaves it goes through a bend."""

    def __init__(self, layer: nn.Module, learned_input: bool = True) -> None:
        super().__init__()
        self.layer = layer
        self.gain = nn.Parameter(torch.tensor(1.5)) if learned_input else None

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.gain is not None:
            inputs = tuple(self.gain * v for v in inputs)
        out = self.layer(*inputs)
        return torch.tanh(out[0] if isinstance(out, tuple) else out)


def warmed_batch_norm() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    return layer.eval()


class OwnParameter(nn.Module):
    """Parameters of its own beside children with theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 1))
        self.inner = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.inner(x + self.table) * self.table.exp()


LAYERS: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (normal(4, 9),)),
    "conv1d circular": (lambda: nn.Conv1d(4, 6, 5, padding=2, padding_mode="circular"), (normal(4, 9),)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (normal(4, 6, 5),)),
    "conv2d 1x1": (lambda: nn.Conv2d(4, 6, 1), (normal(4, 6, 5),)),
    "conv2d without bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), (normal(4, 6, 5),)),
    "conv2d stride": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(1, 0)), (normal(4, 7, 8),)),
    "conv2d dilation": (lambda: nn.Conv2d(4, 6, 3, dilation=2), (normal(4, 7, 6),)),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (normal(4, 6, 5),)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), (normal(4, 6, 5),)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, (4, 3), dilation=(1, 2), padding="same"), (normal(4, 6, 5),)),
    "conv2d valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (normal(4, 6, 5),)),
    "conv2d reflect": (lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"), (normal(4, 6, 5),)),
    "conv2d circular same": (
        lambda: nn.Conv2d(4, 6, (2, 3), padding="same", padding_mode="circular"),
        (normal(4, 6, 5),),
    ),
    "conv2d replicate": (
        lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="replicate"),
        (normal(4, 6, 5),),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 4, (3, 2, 1), stride=(1, 2, 1), padding=1), (normal(2, 4, 5, 3),)),
    "transposed 1d": (
        lambda: nn.ConvTranspose1d(4, 6, 4, stride=3, padding=1, output_padding=2),
        (normal(4, 5),),
    ),
    "transposed 2d": (
        lambda: nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1, output_padding=1, groups=2),
        (normal(4, 3, 5),),
    ),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 2, 2, stride=2, dilation=2), (normal(4, 3, 2, 2),)),
    "linear": (lambda: nn.Linear(4, 6), (normal(4),)),
    "linear on tokens": (lambda: nn.Linear(4, 6), (normal(5, 4),)),
    "linear on pixels without bias": (lambda: nn.Linear(4, 6, bias=False), (normal(5, 3, 4),)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (normal(4, 3, 5),)),
    "group norm of vectors": (lambda: nn.GroupNorm(2, 4), (normal(4),)),
    "layer norm": (lambda: nn.LayerNorm(4), (normal(5, 4),)),
    "layer norm over two axes": (lambda: nn.LayerNorm((3, 4), bias=False), (normal(5, 3, 4),)),
    "attention": (
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        (normal(5, 8), normal(4, 8), normal(4, 8)),
    ),
    "attention with other widths": (
        lambda: nn.MultiheadAttention(8, 2, batch_first=True, kdim=6, vdim=4, add_bias_kv=True),
        (normal(5, 8), normal(4, 6), normal(4, 4)),
    ),
    "batch norm in eval": (warmed_batch_norm, (normal(4, 3, 5),)),
    "prelu": (lambda: nn.PReLU(4), (normal(4, 3, 5),)),
    "prelu with one number": (nn.PReLU, (normal(4),)),
    "own parameters": (OwnParameter, (normal(4, 6),)),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("learned_input", [True, False], ids=["inside", "first"])
def test_the_gradient_of_every_layer_is_that_of_one_sample_at_a_time(case: str, learned_input: bool) -> None:
    """First in a network, nothing before a layer needs a gradient; inside, all of its input does."""
    torch.manual_seed(3)
    make, inputs = LAYERS[case]
    agree(Within(make(), learned_input), *inputs)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 2, -1])
def test_an_embedding_adds_up_where_a_row_is_looked_up_twice(shape: tuple[int, ...], padding_idx: int | None) -> None:
    agree(Within(nn.Embedding(5, 4, padding_idx=padding_idx), learned_input=False), indices(*shape))


def test_norms_without_parameters_are_passed() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Sequential(
                nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4, affine=False), nn.LayerNorm(5, elementwise_affine=False)
            )

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.stack(x)
            return out

    agree(Plain(), normal(2, 3, 5))


@settings(max_examples=40, deadline=None)
@given(
    transposed=st.booleans(),
    kernel=st.tuples(*[st.integers(1, 4)] * 2),
    stride=st.tuples(*[st.integers(1, 3)] * 2),
    padding=st.tuples(*[st.integers(0, 2)] * 2),
    dilation=st.tuples(*[st.integers(1, 2)] * 2),
    groups=st.sampled_from([1, 2, 4]),
    size=st.tuples(*[st.integers(1, 7)] * 2),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    cached=st.booleans(),
)
def test_any_convolution_agrees_whether_its_windows_fit_the_cache_or_not(
    transposed: bool,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    size: tuple[int, int],
    mode: str,
    cached: bool,
) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    chosen = "zeros" if transposed else mode
    layer = kind(
        4, 8, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, padding_mode=chosen
    ).double()
    x = normal(4, *size)
    try:
        layer(x)
    except RuntimeError:  # no output at all, or less image than padding
        assume(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "WINDOW_BYTES", 2**20 if cached else 0)
        agree(Within(layer), x)


class Twice(nn.Module):
    """One layer on two images: its weights are shared."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        first = torch.tanh(self.layer(x))
        second: Tensor = self.layer(first + x)
        return second * first


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(4, 4, 3, padding=1), normal(4, 6, 5)),
        (nn.Linear(4, 4), normal(5, 4)),
        (nn.GroupNorm(2, 4), normal(4, 3)),
        (nn.PReLU(4), normal(4, 3)),
    ],
    ids=lambda v: type(v).__name__,
)
def test_a_layer_called_twice_counts_once(layer: nn.Module, x: Tensor) -> None:
    """The square of the sum, not the sum of squares: gradients of both calls are added before."""
    agree(Twice(layer), x)


@pytest.mark.parametrize("piece_bytes", [1, 4 * 24 * 2, 2**20])
def test_gradients_come_in_pieces_that_add_up(monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> None:
    """Pieces of one sample, of two, and all at once: the same sums of squares."""
    monkeypatch.setattr(rules, "PIECE_BYTES", piece_bytes)
    layer = Twice(nn.Linear(4, 4)) if piece_bytes > 1 else Within(nn.Linear(4, 6))
    agree(layer, normal(5, 4))
    torch.manual_seed(0)
    network, x = Within(nn.Linear(4, 6)).double(), torch.randn(6, 5, 4, dtype=torch.float64)
    counts: dict[str, int] = {}
    found = {}

    def collect(name: str, pieces: rules.Pieces) -> None:
        kept = [piece.clone() for piece in pieces]
        counts[name] = len(kept)
        found[name] = squares(iter(kept), 2, 6)

    per_sample_backward(network, lambda: network(x), torch.ones_like, collect)
    assert counts["layer.weight"] == {1: 6, 4 * 24 * 2: 3, 2**20: 1}[piece_bytes]
    for name, gradients in one_at_a_time(network, (x,), torch.ones(6, 5, 6, dtype=torch.float64)).items():
        torch.testing.assert_close(
            found[name].elements.double(), gradients.square().unflatten(0, (2, 3)).sum(dim=1), rtol=1e-5, atol=0
        )
        norms = gradients.square().reshape(6, -1).sum(dim=1)
        torch.testing.assert_close(found[name].samples, norms, rtol=1e-5, atol=0)


def test_a_parameter_of_no_axes_has_rows_like_any_other() -> None:
    gradients = torch.tensor([1.0, 3.0, 2.0, 4.0])
    found = rows(squares(iter([gradients]), 2, 4), torch.tensor([1.0, 10.0]).double(), 0, pairs=False)
    assert found.mean.tolist() == found.maximum.tolist() == pytest.approx([5.0, 1000.0])
    assert found.channel.tolist() == [pytest.approx([5.0]), pytest.approx([1000.0])]


# --- what cannot be told apart ---------------------------------------------------------------------------------------


class Forward(nn.Module):
    """Two layers and a ``forward`` written for one test."""

    def __init__(self, forward: Callable[["Forward", Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.written = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.written(self, x)


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, half: float = 0.5) -> tuple[Tensor, Tensor]:
        return x * self.scale * half, x * self.scale


def merged(self: Forward, x: Tensor) -> Tensor:
    return self.second(self.first(x).flatten(0, 1)).unflatten(0, x.shape[:2])


def changed_input(self: Forward, x: Tensor) -> Tensor:
    h = torch.tanh(self.first(x))
    out: Tensor = self.second(h)
    h += 1
    return out


def both_halves(self: Forward, x: Tensor) -> Tensor:
    a, b = self.halves(self.first(x))
    return self.second(a + b)


def batch_second(self: Forward, x: Tensor) -> Tensor:
    h = self.first(x).transpose(0, 1)
    return self.second(self.attention(h, h, h)[0].transpose(0, 1))


REFUSED: dict[str, tuple[Forward, Tensor, type[Exception], str]] = {
    "merged axes": (Forward(merged), normal(5, 4), ConfigError, "layer 'second' works on a first axis of 15, not on"),
    "a table of one row": (
        Forward(lambda self, x: self.second(x) + self.first(x[:1])),
        normal(4),
        ConfigError,
        "layer 'first' works on a first axis of 1, not on",
    ),
    "an input changed in place": (
        Forward(changed_input), normal(4), ConfigError, "the input of layer 'second' was changed in place",
    ),
    "a second output": (
        Forward(both_halves, halves=Halves()), normal(4), ConfigError, "more than the first output of layer 'halves'",
    ),
    "a tensor by name": (
        Forward(lambda self, x: self.second(input=self.first(x))), normal(4), ConfigError, "the call of layer 'second'",
    ),
    "the batch second, as long as the first": (
        Forward(batch_second, attention=nn.MultiheadAttention(4, 2)),
        normal(BATCH, 4),
        ConfigError,
        "the call of layer 'attention'",
    ),
    "a parameter unused": (
        Forward(lambda self, x: self.second(x)), normal(4), NumericalError, "'first.weight' and 1 others",
    ),
    "an output that is a view, changed in place": (
        Forward(lambda self, x: torch.relu_(self.second(self.first(x)))),
        normal(5, 4),
        NumericalError,
        "no gradient reached 'second.weight'",
    ),
    "a parameter used from outside its layer": (
        Forward(lambda self, x: nn.functional.linear(self.second(x), self.first.weight, self.first.bias)),
        normal(4),
        NumericalError,
        "no gradient reached 'first.weight'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_told_apart_is_an_error_and_leaves_the_network_as_it_was(case: str) -> None:
    network, x, kind, message = REFUSED[case]
    network.double()
    network.first.bias.requires_grad_(False)
    with pytest.raises(kind, match=message):
        collected(network, (x,), torch.ones(()).double())
    check_untouched(network)


def check_untouched(network: Forward) -> None:
    assert {n for n, p in network.named_parameters() if not p.requires_grad} == {"first.bias"}
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in network.modules())
    assert all(p.grad is None for p in network.parameters())


def test_a_network_is_left_as_it_was() -> None:
    network = Forward(lambda self, x: self.second(self.first(x))).double()
    network.first.bias.requires_grad_(False)
    assert collected(network, (normal(4),), normal(4)).keys() == dict(network.named_parameters()).keys()
    check_untouched(network)


def test_an_unused_second_output_and_options_by_name_are_fine() -> None:
    """Rejects options that are dropped: 0.5 in place of 3."""
    agree(
        Forward(lambda self, x: self.second(self.halves(self.first(x), half=3.0)[0]), halves=Halves()),
        normal(4),
    )
    attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def attend(self: Forward, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(self.attention(h, h, h, need_weights=False)[0])

    agree(Forward(attend, attention=attention), normal(5, 4))


@pytest.mark.parametrize("inplace", [nn.ReLU(inplace=True), nn.SiLU(inplace=True)], ids=["relu", "silu"])
def test_activations_in_place_are_followed(inplace: nn.Module) -> None:
    """After the first layer, whose output nothing before it needs, and after one inside."""
    agree(Forward(lambda self, x: inplace(self.second(inplace(self.first(x)))).square()), normal(4))


def test_the_result_and_the_outputs_of_layers_are_handed_out() -> None:
    network = Forward(lambda self, x: self.second(torch.tanh(self.first(x)))).double()
    x, cotangent, outputs = normal(5, 4), normal(5, 4), {}
    result = per_sample_backward(
        network, lambda: network(x), lambda _: cotangent, lambda name, pieces: None, outputs.__setitem__
    )
    assert torch.equal(result, network(x))
    hidden = torch.tanh(network.first(x))
    torch.testing.assert_close(outputs["second"], cotangent)
    torch.testing.assert_close(outputs["first"], (cotangent @ network.second.weight) * (1 - hidden.square()))
