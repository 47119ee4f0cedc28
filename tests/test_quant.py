import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fqdiff.errors import ConfigError, QuantizationError
from fqdiff.quant.container import file_bytes, metadata, part_name, stored_tensors
from fqdiff.quant.formats import FORMATS, PerChannel, PerTensor, get_format, parse_granularity
from fqdiff.quant.packed import pack_tensor, stored_bytes, unpack_tensor
from fqdiff.quant.packing import pack, packed_bytes, unpack
from fqdiff.quant.qparams import choose_qparams, dequantize, quantize
from fqdiff.store.files import write_tensors

INTEGERS = [f.name for f in FORMATS.values() if f.is_integer]
tensors = st.integers(0, 10_000).map(lambda seed: _random_tensor(seed))


def _random_tensor(seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    shape = tuple(int(n) for n in torch.randint(1, 6, (3,), generator=g))
    scale = 10 ** float(torch.rand((), generator=g) * 12 - 6)
    return torch.randn(shape, generator=g) * scale + float(torch.randn((), generator=g)) * scale


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(1, 8), codes=st.lists(st.integers(0, 255), max_size=60))
def test_packing_is_bit_exact_at_every_width_and_length(bits: int, codes: list[int]) -> None:
    original = torch.tensor([c % 2**bits for c in codes], dtype=torch.uint8)
    stream = pack(original, bits)
    assert stream.numel() == packed_bytes(len(codes), bits) == -(-len(codes) * bits // 8)
    assert torch.equal(unpack(stream, bits, tuple(original.shape)), original)


def test_packing_is_little_endian_as_documented() -> None:
    assert pack(torch.tensor([1, 2, 3, 4], dtype=torch.uint8), 4).tolist() == [0x21, 0x43]
    assert pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 3).tolist() == [0b11_010_001, 0b0]


def test_a_code_too_large_for_its_width_is_refused() -> None:
    with pytest.raises(QuantizationError, match="code 16 does not fit in 4 bits"):
        pack(torch.tensor([16], dtype=torch.uint8), 4)


@settings(max_examples=80, deadline=None)
@given(x=tensors, name=st.sampled_from(INTEGERS), per_channel=st.booleans())
def test_rounding_to_nearest_is_off_by_half_a_step_at_most(x: torch.Tensor, name: str, per_channel: bool) -> None:
    fmt, granularity = get_format(name), PerChannel(1) if per_channel else PerTensor()
    qparams = choose_qparams(x, fmt, granularity)
    back = dequantize(quantize(x, qparams, fmt, granularity), qparams, granularity)
    step = qparams.scale.view(1, -1, 1) if per_channel else qparams.scale
    assert bool(((x - back).abs() <= step * 0.5001).all())


@settings(max_examples=40, deadline=None)
@given(x=tensors, name=st.sampled_from(INTEGERS))
def test_quantizing_is_idempotent_on_its_grid_and_keeps_zero(x: torch.Tensor, name: str) -> None:
    fmt = get_format(name)
    x.view(-1)[0] = 0.0
    qparams = choose_qparams(x, fmt, PerTensor())
    once = dequantize(quantize(x, qparams, fmt, PerTensor()), qparams, PerTensor())
    again = dequantize(quantize(once, qparams, fmt, PerTensor()), qparams, PerTensor())
    assert torch.equal(once, again)
    assert float(once.view(-1)[0]) == 0.0


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_tensor_of_zeros_stays_zero(name: str) -> None:
    assert torch.equal(unpack_tensor(pack_tensor(torch.zeros(3, 5), get_format(name), PerTensor())), torch.zeros(3, 5))


def test_per_channel_scales_follow_their_axis() -> None:
    x = torch.ones(2, 3, 4) * torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1)
    assert torch.allclose(
        choose_qparams(x, get_format("int8"), PerChannel(1)).scale * 255, torch.tensor([1.0, 10, 100])
    )


@pytest.mark.parametrize("name", list(FORMATS))
def test_stored_bytes_are_the_bytes_of_the_parts(name: str) -> None:
    packed = pack_tensor(torch.randn(5, 7, 3), get_format(name), PerChannel(0))
    assert stored_bytes((5, 7, 3), packed.format, packed.granularity) == sum(t.nbytes for t in packed.parts.values())


def test_int4_is_two_weights_to_a_byte() -> None:
    packed = pack_tensor(torch.randn(8, 16), get_format("int4"), PerChannel(0))
    assert packed.parts["codes"].numel() == 64
    assert packed.parts["zero_point"].numel() == 4


def test_a_cast_that_overflows_is_refused() -> None:
    with pytest.raises(QuantizationError, match="float16"):
        pack_tensor(torch.tensor([1e6]), get_format("float16"), PerTensor())


def test_nan_is_refused() -> None:
    with pytest.raises(QuantizationError, match="NaN"):
        pack_tensor(torch.tensor([float("nan")]), get_format("int4"), PerTensor())


@settings(max_examples=40, deadline=None)
@given(
    names=st.lists(st.text('abcXYZ09._é"\\', min_size=1, max_size=8), min_size=1, max_size=6, unique=True),
    formats=st.lists(st.sampled_from(list(FORMATS)), min_size=6, max_size=6),
    width=st.integers(1, 40),
)
def test_the_predicted_file_size_is_what_safetensors_writes(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], formats: list[str], width: int
) -> None:
    path = tmp_path_factory.mktemp("size") / "model.safetensors"
    packed = {
        f"{i}.{name}": pack_tensor(torch.randn(3, width), get_format(f), PerChannel(0))
        for i, (name, f) in enumerate(zip(names, formats, strict=False))
    }
    described = {name: (p.shape, p.format, p.granularity) for name, p in packed.items()}
    meta = metadata({"anything": names}, described)
    write_tensors(path, {part_name(n, part): t for n, p in packed.items() for part, t in p.parts.items()}, meta)
    assert file_bytes(stored_tensors(described), meta) == path.stat().st_size


@pytest.mark.parametrize("text", ["channel", "channel:", "channel:-1", "channel:10", "group:3", "", "tensor:0"])
def test_an_unknown_granularity_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="unknown granularity"):
        parse_granularity(text)


def test_granularities_read_back() -> None:
    for granularity in (PerTensor(), PerChannel(0), PerChannel(3)):
        assert parse_granularity(str(granularity)) == granularity
