import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from fqdiff.errors import ConfigError, QuantizationError
from fqdiff.quant.container import file_bytes, metadata, part_name, stored_tensors
from fqdiff.quant.formats import (
    FORMATS,
    Format,
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    get_format,
    parse_granularity,
    without_zero_point,
)
from fqdiff.quant.packed import PackedTensor, check_values, pack_tensor, stored_bytes, unpack_tensor
from fqdiff.quant.packing import pack, packed_bytes, unpack
from fqdiff.quant.qparams import (
    choose_qparams,
    dequantize,
    from_rows,
    group_rows,
    quantize,
    stored_scale,
    ternary_scale,
)
from fqdiff.store.files import write_tensors

INTEGERS = [f.name for f in FORMATS.values() if f.is_integer]
GRIDS = [*INTEGERS, "ternary"]
SCALED = [f.name for f in FORMATS.values() if not f.is_cast]
SCALES = (torch.float32, torch.float16)
scale_dtypes = st.sampled_from(SCALES)
granularities = st.one_of(
    st.builds(PerTensor, scale_dtypes),
    st.builds(PerChannel, st.integers(0, 9), scale_dtypes),
    st.builds(PerGroup, st.integers(1, 10**9 - 1), st.integers(0, 9), scale_dtypes),
)


def _random_tensor(seed: int, magnitudes: float = 12) -> torch.Tensor:
    """Of 1-5 x 1-5 x 1-5 numbers, off their mean; ``magnitudes``: powers of ten that it may span, around 1."""
    g = torch.Generator().manual_seed(seed)
    shape = tuple(int(n) for n in torch.randint(1, 6, (3,), generator=g))
    scale = 10 ** float((torch.rand((), generator=g) - 0.5) * magnitudes)
    return torch.randn(shape, generator=g) * scale + float(torch.randn((), generator=g)) * scale


def grains(x: torch.Tensor) -> list[Granularity]:
    """Every granularity for ``x`` [a, b, c], the group size a whole row and a part of it."""
    a, b, c = x.shape
    return [
        kind
        for dtype in SCALES
        for kind in (
            PerTensor(dtype),
            PerChannel(0, dtype),
            PerChannel(1, dtype),
            PerGroup(c, 0, dtype),
            PerGroup(b * c, 0, dtype),
            PerGroup(a, 1, dtype),
            PerGroup(1, 2, dtype),
        )
    ]


def _case(seed: int, number: int) -> tuple[torch.Tensor, Granularity]:
    grain = grains(_random_tensor(seed))[number]
    return _random_tensor(seed, 12 if grain.scale_dtype == torch.float32 else 4), grain


cases = st.builds(_case, st.integers(0, 10_000), st.integers(0, 13))  # a tensor with a granularity for it


def there_and_back(x: torch.Tensor, fmt: Format, grain: Granularity) -> torch.Tensor:
    return unpack_tensor(pack_tensor(x, fmt, grain))


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


@settings(max_examples=150, deadline=None)
@given(case=cases, name=st.sampled_from(INTEGERS))
def test_rounding_to_nearest_is_off_by_half_a_step_at_most(case: tuple[torch.Tensor, Granularity], name: str) -> None:
    """Rejects float16 scales that are rounded to nearest: at the ends of the range they lose up to a whole step."""
    fmt, (x, granularity) = get_format(name), case
    qparams = choose_qparams(x, fmt, granularity)
    error = there_and_back(x, fmt, granularity) - x
    assert bool((group_rows(error, granularity).abs() <= qparams.scale[:, None].abs() * 0.5001).all())


@settings(max_examples=120, deadline=None)
@given(case=cases, name=st.sampled_from(SCALED))
def test_quantizing_is_idempotent_on_its_grid_and_keeps_zero(case: tuple[torch.Tensor, Granularity], name: str) -> None:
    fmt, (x, granularity) = get_format(name), case
    x.view(-1)[0] = 0.0
    qparams = choose_qparams(x, fmt, granularity)
    once = dequantize(quantize(x, qparams, fmt, granularity), qparams, granularity)
    again = dequantize(quantize(once, qparams, fmt, granularity), qparams, granularity)
    assert torch.equal(once, again)
    assert float(once.view(-1)[0]) == 0.0


@settings(max_examples=60, deadline=None)
@given(case=cases)
def test_a_ternary_tensor_is_its_own_ternary_form(case: tuple[torch.Tensor, Granularity]) -> None:
    once = there_and_back(case[0], get_format("ternary"), case[1])
    assert torch.equal(there_and_back(once, get_format("ternary"), case[1]), once)


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
    x = torch.randn(5, 7, 3)
    for grain in grains(x):
        packed = pack_tensor(x, get_format(name), grain)
        assert stored_bytes((5, 7, 3), packed.format, packed.granularity) == sum(
            t.nbytes for t in packed.parts.values()
        )


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


@pytest.mark.parametrize("name", list(FORMATS))
def test_every_format_at_every_granularity_has_the_predicted_size_and_reads_back(name: str, tmp_path: Path) -> None:
    path, x = tmp_path / "model.safetensors", torch.randn(5, 3, 7)
    for grain, size in product(grains(x), (5, 1)):
        packed = pack_tensor(x[:size], get_format(name), grain if size == 5 else PerTensor(grain.scale_dtype))
        described = {"w": (packed.shape, packed.format, packed.granularity)}
        meta = metadata({}, described)
        write_tensors(path, {part_name("w", part): t for part, t in packed.parts.items()}, meta)
        assert file_bytes(stored_tensors(described), meta) == path.stat().st_size
        with safe_open(path, "pt") as file:
            parts = {part: file.get_tensor(part_name("w", part)) for part in packed.parts}
        back = PackedTensor(packed.format, packed.granularity, packed.shape, parts)
        check_values(back)
        assert torch.equal(unpack_tensor(back), unpack_tensor(packed))


@pytest.mark.parametrize("name", SCALED)
def test_a_reader_that_knows_only_the_documentation_finds_the_same_values(name: str, tmp_path: Path) -> None:
    """numpy and the text of docs/artifacts.md, none of fqdiff's own reading."""
    path, x = tmp_path / "model.safetensors", torch.randn(6, 4, 10)
    for grain in grains(x):
        packed = pack_tensor(x, get_format(name), grain)
        described = {"w": (packed.shape, packed.format, packed.granularity)}
        write_tensors(path, {part_name("w", k): t for k, t in packed.parts.items()}, metadata({}, described))
        assert np.array_equal(read_with_numpy(path, "w"), unpack_tensor(packed).numpy())


def read_with_numpy(path: Path, name: str, phase: int | None = None) -> np.ndarray:
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    facts = json.loads(header["__metadata__"]["fqdiff"])["quantized"][name]
    shape, count = facts["shape"], int(np.prod(facts["shape"]))
    kept, _, granularity = facts["granularity"].rpartition("+")

    def raw(part: str) -> np.ndarray:
        begin, end = header[part]["data_offsets"]
        return np.frombuffer(content[start + begin : start + end], np.uint8)

    stored, _, phases = facts["format"].partition(":")
    phase_bits = [int(bits) for bits in phases.split("/")] if phases else []

    def codes_of(stream: np.ndarray, number: int, bits: int = 0) -> np.ndarray:
        if facts["format"] == "ternary":
            return np.array([byte // 3**k % 3 for byte in stream.tolist() for k in range(5)][:number])
        bits = bits or int(stored.removesuffix("sym").removeprefix("int").removeprefix("codebook"))
        digits = np.unpackbits(stream, bitorder="little")[: number * bits].reshape(number, bits)
        return digits @ (1 << np.arange(bits))

    def nested_codes() -> np.ndarray:
        codes, known, levels = np.zeros(count, np.int64), 0, sorted(set(phase_bits))
        wanted = levels[-1] if phase is None else phase_bits[phase]
        for number, level in enumerate(level for level in levels if level <= wanted):
            plane = codes_of(raw(f"{name}.plane{number}" if number else f"{name}.codes"), count, level - known)
            codes, known = codes * 2 ** (level - known) + plane, level
        steps = 2 ** (levels[-1] - wanted)
        return codes * steps + (steps - 1) / 2

    def values() -> np.ndarray:
        if facts["format"] in ("float32", "float16", "bfloat16"):
            return cast_value(raw(name), facts["format"]).reshape(shape)
        numbers = granularity.removesuffix(":float16").split(":")[1:]
        dtype = "<f2" if granularity.endswith(":float16") else "<f4"
        axis = int(numbers[-1]) if numbers else 0
        if facts["format"].startswith("codebook"):
            rows = np.moveaxis(codes_of(raw(f"{name}.codes"), count).reshape(shape), axis, 0)
            book = raw(f"{name}.codebook").view(dtype).astype(np.float32)
            book = book.reshape(header[f"{name}.codebook"]["shape"])
            if granularity.startswith("split"):
                second = np.arange(rows.shape[1]) >= int(numbers[0])
                of_weight = (2 * np.arange(len(rows))[:, None] + second).reshape(
                    *rows.shape[:2], *[1] * (rows.ndim - 2)
                )
                return np.moveaxis(book[of_weight, rows], 0, axis)
            named = np.take_along_axis(book, rows.reshape(len(book), -1), axis=1)
            return np.moveaxis(named.reshape(rows.shape), 0, axis)
        scale = raw(f"{name}.scale").view(dtype).astype(np.float32)
        if facts["format"].startswith("float8"):
            codes = np.array([float8_value(b, facts["format"]) for b in raw(f"{name}.codes").tolist()], np.float32)
            zero = np.zeros(len(scale))
        else:
            codes = nested_codes() if phases else codes_of(raw(f"{name}.codes"), count)
            if f"{name}.zero_point" in header:
                zero = codes_of(raw(f"{name}.zero_point"), len(scale))
            else:
                zero = np.full(len(scale), 1 if facts["format"] == "ternary" else codes_middle(stored))
        rows = np.moveaxis(codes.reshape(shape), axis, 0)
        if granularity.startswith("split"):
            second = np.arange(rows.shape[1]) >= int(numbers[0])
            of_weight = (2 * np.arange(len(rows))[:, None] + second).reshape(*rows.shape[:2], *[1] * (rows.ndim - 2))
            found = (rows - zero[of_weight]).astype(np.float32) * scale[of_weight]
            return np.moveaxis(found, 0, axis)
        found = (rows.reshape(len(scale), -1) - zero[:, None]).astype(np.float32) * scale[:, None]
        return np.moveaxis(found.reshape(rows.shape), 0, axis)

    if not kept:
        return values()
    k, high = int(kept.split(":")[1]), kept.split(":")[2]
    weight = values().flatten()
    weight[read_index(raw(f"{name}.kept_index"), k, count)] = cast_value(raw(f"{name}.kept"), high)
    return weight.reshape(shape)


def read_index(stream: np.ndarray, k: int, count: int) -> np.ndarray:
    low, bits = int(np.log2(count // k)), np.unpackbits(stream, bitorder="little").astype(int)
    if len(stream) == -(-count // 8):
        return np.flatnonzero(bits)
    lowest = bits[: k * low].reshape(k, low) @ (1 << np.arange(low))
    return (np.flatnonzero(bits[k * low :]) - np.arange(k)) * 2**low + lowest


def cast_value(content: np.ndarray, name: str) -> np.ndarray:
    if name == "bfloat16":  # the upper half of a float32
        return (content.view("<u2").astype("<u4") << 16).view("<f4")
    return content.view("<f2" if name == "float16" else "<f4").astype(np.float32)


def codes_middle(name: str) -> int:
    return int(2 ** (int(name[3:-3]) - 1))


def float8_value(byte: int, name: str) -> float:
    """The number that a byte stands for, by the definition (Micikevicius et al. 2022)."""
    mantissa_bits, bias = (3, 7) if name == "float8_e4m3" else (2, 15)
    sign, rest = (-1.0 if byte & 0x80 else 1.0), byte & 0x7F
    exponent, mantissa = rest >> mantissa_bits, rest & (2**mantissa_bits - 1)
    if name == "float8_e4m3" and rest == 0x7F:
        return float("nan")
    if name == "float8_e5m2" and exponent == 31:
        return float("nan") if mantissa else sign * float("inf")
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


@pytest.mark.parametrize("name", ["float8_e4m3", "float8_e5m2"])
@pytest.mark.parametrize("scale_dtype", SCALES)
def test_float8_takes_the_nearest_of_its_numbers(name: str, scale_dtype: torch.dtype) -> None:
    """Against all 256 bytes, one weight at a time; ties to the even byte. Rejects a plain cast: it has no scale."""
    fmt, x = get_format(name), 1e-3 * torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    x[0, :5] = torch.tensor([0.0, 1e-9, -1e-9, 5e-3, -5e-3])
    packed = pack_tensor(x, fmt, PerChannel(0, scale_dtype))
    numbers = {b: v for b in range(256) if np.isfinite(v := float8_value(b, name))}
    assert fmt.qmax in numbers.values()
    codes = packed.parts["codes"].view(torch.uint8)
    for row, scale in enumerate(packed.parts["scale"].float()):
        assert float(scale) * fmt.qmax >= float(x[row].abs().max()) * (1 - 1e-6)
        for value, code in zip((x[row] / scale).tolist(), codes[row].tolist(), strict=True):
            nearest = min(numbers, key=lambda b: (abs(numbers[b] - value), b & 1))
            assert numbers[code] == numbers[nearest]
    assert bool(((unpack_tensor(packed) - x).abs() <= x.abs() / 8 + 1e-7).all())


def test_ternary_is_the_least_squares_fit() -> None:
    """Against every choice of how many weights are not 0, and against a fine grid of scales."""
    rows = torch.randn(20, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for row, scale in zip(rows, ternary_scale(rows), strict=True):

        def error(s: float, row: torch.Tensor = row) -> float:
            return float((row - s * (row / s).round().clamp(-1, 1)).square().sum())

        largest = float(row.abs().max())
        assert error(float(scale)) <= min(error(k / 2000 * largest) for k in range(1, 2001)) + 1e-12


def test_ternary_is_five_weights_to_a_byte_with_the_first_lowest() -> None:
    assert pack(torch.tensor([0, 1, 2, 0, 1, 2], dtype=torch.uint8), 1.6).tolist() == [0 + 3 + 18 + 0 + 81, 2]
    assert stored_bytes((8, 16), get_format("ternary"), PerTensor()) == 26 + 4


@settings(max_examples=40, deadline=None)
@given(codes=st.lists(st.integers(0, 2), max_size=60))
def test_trits_are_bit_exact_at_every_length(codes: list[int]) -> None:
    original = torch.tensor(codes, dtype=torch.uint8)
    stream = pack(original, 1.6)
    assert stream.numel() == packed_bytes(len(codes), 1.6) == -(-len(codes) // 5)
    assert torch.equal(unpack(stream, 1.6, tuple(original.shape)), original)


def test_a_code_of_3_is_no_trit() -> None:
    with pytest.raises(QuantizationError, match="code 3 does not fit"):
        pack(torch.tensor([3], dtype=torch.uint8), 1.6)


@pytest.mark.parametrize("name", [n for n in INTEGERS if n.endswith("sym")])
def test_symmetric_stores_no_zero_point_and_reaches_the_longer_side(name: str) -> None:
    fmt = get_format(name)
    for sign in (1, -1):
        x = sign * torch.linspace(-1, 0.4, 30).view(1, 30)
        packed = pack_tensor(x, fmt, PerChannel(0))
        assert packed.parts.keys() == {"codes", "scale"}
        assert abs(float(packed.parts["scale"])) == pytest.approx(
            max(1 / 2 ** (fmt.bits - 1), 0.4 / (2 ** (fmt.bits - 1) - 1))
        )
        assert float(unpack_tensor(packed)[0, 0]) == pytest.approx(-sign, rel=1e-6) or fmt.bits == 2


def test_every_asymmetric_format_has_a_symmetric_row() -> None:
    for fmt in FORMATS.values():
        other = without_zero_point(fmt)
        assert (other.bits, other.kind) == (fmt.bits, fmt.kind)
        assert not other.has_zero_points


def test_groups_are_consecutive_weights_of_an_output_channel() -> None:
    x = torch.arange(24.0).view(2, 3, 4)
    assert group_rows(x, PerGroup(4, 0))[1].tolist() == [4, 5, 6, 7]
    assert group_rows(x, PerGroup(4, 1))[0].tolist() == [0, 1, 2, 3]  # channel 0 of axis 1, first input channel
    assert group_rows(x, PerGroup(4, 1))[1].tolist() == [
        12,
        13,
        14,
        15,
    ]  # the same output channel, second input channel


@settings(max_examples=30, deadline=None)
@given(case=cases)
def test_rows_go_back_where_they_came_from(case: tuple[torch.Tensor, Granularity]) -> None:
    x, grain = case
    assert torch.equal(from_rows(group_rows(x, grain), tuple(x.shape), grain), x)


def test_smaller_groups_have_smaller_errors() -> None:
    x = torch.randn(16, 16, 3, 3, generator=torch.Generator().manual_seed(3)).pow(3)
    steps = [PerTensor(), PerChannel(0), PerGroup(72, 0), PerGroup(16, 0), PerGroup(4, 0)]
    for name in SCALED[2:]:
        errors = [float((there_and_back(x, get_format(name), g) - x).square().mean()) for g in steps]
        assert errors == sorted(errors, reverse=True), name


@pytest.mark.parametrize("axis", [0, 1])
def test_a_group_size_that_does_not_divide_names_those_that_do(axis: int) -> None:
    shape = (4, 16, 3, 3) if axis == 0 else (16, 4, 3, 3)
    with pytest.raises(QuantizationError, match="groups of 32 do not divide the 144 weights") as caught:
        pack_tensor(torch.randn(shape), get_format("int4"), PerGroup(32, axis))
    assert caught.value.hint == "sizes that do: 16, 18, 24, 36, 48, 72"


# --- float16 scales --------------------------------------------------------------------------------------------------


def test_float16_scales_round_up_by_less_than_a_float16_step() -> None:
    scale = 10 ** torch.linspace(-4, 4, 500, dtype=torch.float64)
    stored = stored_scale(scale, torch.float16)
    assert torch.equal(stored, stored.half().float())
    assert bool(((stored >= scale) & (stored <= scale * (1 + 2**-10))).all())


def test_weights_too_large_or_too_small_for_float16_scales_are_refused() -> None:
    for size in (1e7, 1e-7):
        x = size * torch.tensor([[1.0, -1.0], [0.0, 0.0]])
        assert bool((there_and_back(x, get_format("int4"), PerTensor()) != 0)[0].all())
        for name in ("int4", "int4sym", "ternary"):
            with pytest.raises(QuantizationError, match="float16 cannot hold scales") as caught:
                pack_tensor(x, get_format(name), PerChannel(0, torch.float16))
            assert "float32" in caught.value.hint


def test_a_tiny_channel_beside_a_normal_one_keeps_its_zero_and_its_half_step() -> None:
    """Rejects float16 scales that underflow to 0: the quotient is then infinite or NaN."""
    x = torch.tensor([[1.0, -0.5], [1e-9, -1e-9], [3e-6, 0.0]])
    for name in SCALED:
        back = there_and_back(x, get_format(name), PerChannel(0, torch.float16))
        assert bool(((back - x).abs() <= (x.abs() / 8).clamp(min=2**-24))[1:].all()), name


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "channel", "channel:", "channel:-1", "channel:10", "channel:0:float32", "channel:0:0", "channel:\u0663", "group:3",
        "group:0:0", "group:032:0", "group:32", "group:32:0:", "group:-4:0", "group:1e3:0", "group:9999999999:0", "", "tensor:0",
        "tensor:bfloat16", "tensor ", "tensor\n", ":float16",
    ],
)  # fmt: skip
def test_an_unknown_granularity_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="unknown granularity"):
        parse_granularity(text)


@given(granularity=granularities)
def test_granularities_read_back(granularity: Granularity) -> None:
    assert parse_granularity(str(granularity)) == granularity


@given(text=st.from_regex(r"(tensor|channel:[0-9]{1,2}|group:[0-9]{1,3}:[0-9])(:float16)?", fullmatch=True))
def test_a_granularity_has_one_name_only(text: str) -> None:
    try:
        granularity = parse_granularity(text)
    except ConfigError:
        return
    assert str(granularity) == text


@pytest.mark.parametrize("name", list(FORMATS))
def test_formats_read_back(name: str) -> None:
    assert get_format(name).name == name
    assert parse_granularity("tensor") == PerTensor()
