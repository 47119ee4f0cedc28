"""Models loaded with packed weights: what they compute, what they hold, and what is no model."""

import copy
import gc
import os
import subprocess
import sys
import types
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fqdiff
from fqdiff.errors import ArtifactCorrupt, ArtifactNotFound, FqdiffError, QuantizationError
from fqdiff.models.registry import build, output_axes
from fqdiff.quant.container import part_name
from fqdiff.quant.formats import PerTensor, get_format
from fqdiff.quant.granularity import granularities
from fqdiff.quant.modules import PackedParameter, hold_packed
from fqdiff.quant.packed import PackedTensor, pack_tensor, unpack_tensor
from fqdiff.store.loading import is_path
from fqdiff.store.model_files import read_model, write_model
from fqdiff.store.store import Store
from fqdiff.values import Checkpoint, QuantizedCheckpoint
from tests.test_store import put, tiny_value

WAYS = [
    ("float32", "tensor"),
    ("float16", "tensor"),
    ("bfloat16", "tensor"),
    ("int8", "tensor"),
    ("int4", "channel"),
    ("int4sym", "group-near:16"),
    ("int3", "channel"),
    ("ternary", "channel"),
    ("float8_e4m3", "channel"),
    ("float8_e5m2", "group-near:32"),
]
both_modes = pytest.mark.parametrize("cache", [False, True])


def packed_as(network: nn.Module, tensors: Mapping[str, Tensor], name: str, wish: str) -> dict[str, PackedTensor]:
    """``tensors`` of more than one axis in the format ``name``, the others as they are."""
    axes, fmt = output_axes(network), get_format(name)
    many = {n: (tuple(t.shape), axes[n]) for n, t in tensors.items() if t.ndim > 1}
    grains = dict.fromkeys(many, PerTensor()) if fmt.is_cast else granularities(wish, "float16", many, {})
    kept = get_format("float32")
    return {n: pack_tensor(t, fmt if n in many else kept, grains.get(n, PerTensor())) for n, t in tensors.items()}


def quantized(checkpoint: Checkpoint, name: str = "int4", wish: str = "channel") -> QuantizedCheckpoint:
    network = build(checkpoint.spec.architecture, "meta")
    return QuantizedCheckpoint(checkpoint.spec, packed_as(network, checkpoint.tensors, name, wish))


def loaded(model: QuantizedCheckpoint, folder: Path, cache: bool = False) -> tuple[Any, int]:
    """The network from a file of ``model``, and the file's size."""
    path = folder / "model.safetensors"
    write_model(model, path)
    return fqdiff.load(path, cache=cache), path.stat().st_size


def inputs(count: int = 2) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return torch.randn(count, 1, 8, 8, generator=draw), torch.randint(0, 1000, (count,), generator=draw)


def same_output(one: nn.Module, other: nn.Module) -> bool:
    with torch.no_grad():
        return torch.equal(one(*inputs()), other(*inputs()))


# --- what they compute -----------------------------------------------------------------------------------------------


@both_modes
@pytest.mark.parametrize(("name", "wish"), WAYS)
def test_outputs_are_those_of_the_float32_network_to_the_bit(
    name: str, wish: str, cache: bool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    network, _ = loaded(quantized(checkpoint, name, wish), tmp_path, cache)
    assert not network.training
    reference = read_model(tmp_path / "model.safetensors").network()  # the same strides: others mean other kernels
    for _ in range(2):
        assert same_output(network, reference)


def test_a_model_of_all_formats_and_granularities_at_once(tmp_path: Path) -> None:
    model = tiny_value("quantized")
    assert same_output(loaded(model, tmp_path)[0], model.network())


class Layers(nn.Module):
    """Layers of all sorts, a parameter of its own, and one of a child that it uses without calling the child."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(6, 1, 1))
        self.embedding = nn.Embedding(10, 6)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.GroupNorm(2, 6)
        self.up = nn.ConvTranspose2d(6, 6, 4, stride=2, padding=1, bias=False)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.layer_norm = nn.LayerNorm(6)
        self.encoder = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)  # reads its children's weights
        self.linear = nn.Linear(6, 4)

    def forward(self, token: Tensor) -> Tensor:
        x = self.gain * self.embedding(token).permute(0, 2, 1)[..., None]
        x = self.up(self.norm(self.conv(x))).flatten(2).permute(0, 2, 1)
        x = x + self.attention(x, x, x)[0]
        x = self.encoder(self.layer_norm(x))
        return F.linear(x, self.linear.weight, self.linear.bias)


@both_modes
@pytest.mark.parametrize(("name", "wish"), [("int3", "channel"), ("float8_e4m3", "tensor"), ("bfloat16", "tensor")])
def test_every_layer_works_also_where_a_parent_reads_the_parameter(name: str, wish: str, cache: bool) -> None:
    """Rejects values that are there only while the layer that owns them runs."""
    torch.manual_seed(0)
    network = Layers().eval()
    packed = packed_as(network, dict(network.state_dict()), name, wish)
    reference = copy.deepcopy(network)
    reference.load_state_dict({n: unpack_tensor(p) for n, p in packed.items()})
    hold_packed(network, packed, cache)
    assert not list(network.parameters())
    token = torch.randint(0, 10, (3, 5))
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(network(token), reference(token))
    assert torch.equal(network(token), reference.requires_grad_(False)(token))


def test_gradients_reach_the_input_also_after_use_in_inference_mode(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Rejects cached values that are inference tensors: autograd does not save them."""
    model = quantized(checkpoint)
    network, _ = loaded(model, tmp_path, cache=True)
    with torch.inference_mode():
        network(*inputs())
    gradients = []
    for one in (network, model.network()):
        x, t = inputs()
        one(x.requires_grad_(), t).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_autocast_computes_in_another_dtype(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = quantized(checkpoint)
    network, _ = loaded(model, tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        assert network(*inputs()).dtype == torch.bfloat16
        assert same_output(network, model.network())


def test_a_copy_stands_alone(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = quantized(checkpoint)
    network, _ = loaded(model, tmp_path)
    twin = copy.deepcopy(network)
    for buffer in network.buffers():
        buffer.zero_()
    assert same_output(twin, model.network())


# --- what they hold --------------------------------------------------------------------------------------------------


def resident(network: nn.Module) -> int:
    """Bytes of all tensors that can be reached from ``network`` in any way, but for the table of its timesteps' sines."""
    table = {b.untyped_storage().data_ptr() for name, b in network.named_buffers() if name.endswith(".table")}
    assert len(table) == 1
    waiting: list[Any] = [network]
    seen = set()
    sizes = {}
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, type | types.ModuleType | types.FunctionType):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            sizes[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        waiting += gc.get_referents(one)
    return sum(size for start, size in sizes.items() if start not in table)


@pytest.mark.parametrize(("name", "wish"), WAYS)
def test_weights_take_no_more_memory_than_in_the_file(
    name: str, wish: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    network, size = loaded(quantized(checkpoint, name, wish), tmp_path)
    assert 0 < resident(network) <= size
    with torch.no_grad():
        network(*inputs())
    assert 0 < resident(network) <= size


def test_cached_weights_are_kept_and_counted(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Shows that the count above finds a float32 copy where there is one."""
    network, size = loaded(quantized(checkpoint), tmp_path, cache=True)
    assert resident(network) <= size
    with torch.no_grad():
        network(*inputs())
    many = sum(4 * t.numel() for t in checkpoint.tensors.values() if t.ndim > 1)
    assert resident(network) > many


class Live:
    """Bytes of dequantized values that are alive, now and at most, by hooks on the packed parameters."""

    def __init__(self, network: nn.Module) -> None:
        self.now = self.most = 0
        for module in network.modules():
            if isinstance(module, PackedParameter):
                module.register_forward_hook(self.count)

    def count(self, module: nn.Module, arguments: object, values: Tensor) -> None:
        if values.data_ptr() not in {b.data_ptr() for b in module.buffers()}:  # float32 is resident as it is
            self.now += values.nbytes
            self.most = max(self.most, self.now)
            weakref.finalize(values, self.free, values.nbytes)

    def free(self, size: int) -> None:
        self.now -= size


def largest_layer(model: QuantizedCheckpoint) -> int:
    """float32 bytes of the layer with the most weights."""
    sizes: dict[str, int] = {}
    for name, packed in model.packed.items():
        layer = name.rpartition(".")[0]
        sizes[layer] = sizes.get(layer, 0) + 4 * torch.Size(packed.shape).numel()
    return max(sizes.values())


def test_one_layer_is_dequantized_at_a_time_and_let_go(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = quantized(checkpoint)
    network, _ = loaded(model, tmp_path)
    live = Live(network)
    with torch.no_grad():
        network(*inputs())
    assert live.now == 0
    assert 0 < live.most <= largest_layer(model)


def test_an_exception_leaves_nothing_behind(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = quantized(checkpoint)
    network, _ = loaded(model, tmp_path)
    live = Live(network)
    _, t = inputs()
    with suppress(RuntimeError):
        network(torch.randn(2, 3, 8, 8), t)
    assert live.most > 0
    assert live.now == 0
    assert same_output(network, model.network())


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once of all that operations made."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.users: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.count(tensor, known)
        return result

    def count(self, tensor: Tensor, known: set[int]) -> None:
        start, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if start not in self.users:
            if start in known:
                return  # a view of something from before
            self.now += size
            self.most = max(self.most, self.now)
        self.users[start] = self.users.get(start, 0) + 1
        weakref.finalize(tensor, self.free, start, size)

    def free(self, start: int, size: int) -> None:
        self.users[start] -= 1
        if not self.users[start]:
            del self.users[start]
            self.now -= size


@pytest.mark.parametrize("name", ["int8", "int4", "int3", "ternary", "float8_e4m3", "float16"])
def test_the_peak_is_that_of_the_activations_and_two_copies_of_a_layer(
    name: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """All that dequantizing takes on the way is counted too: rejects 64 bits for every code."""
    model = quantized(checkpoint, name)
    network, _ = loaded(model, tmp_path)
    peaks = []
    for one in (network, model.network()):
        x, t = inputs(1)
        with torch.no_grad(), Peak() as peak:
            one(x, t)
        peaks.append(peak.most)
    assert peaks[1] < peaks[0] <= peaks[1] + 2.3 * largest_layer(model)


@both_modes
def test_weights_move_with_the_network(cache: bool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """To the meta device, where an operation with a tensor left on the CPU fails."""
    network, _ = loaded(quantized(checkpoint), tmp_path, cache)
    x, t = inputs()
    network(x, t)
    dtypes = [b.dtype for b in network.buffers()]
    network.to("meta")
    assert [b.dtype for b in network.buffers()] == dtypes
    assert network(x.to("meta"), t.to("meta")).device.type == "meta"


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.double, lambda n: n.to(torch.bfloat16)])
def test_another_dtype_is_refused_and_changes_nothing(
    convert: Callable[[nn.Module], nn.Module], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    model = quantized(checkpoint)
    network, _ = loaded(model, tmp_path)
    with pytest.raises(QuantizationError, match="packed weights cannot become") as error:
        convert(network)
    assert "autocast" in error.value.hint
    assert same_output(network, model.network())


@both_modes
def test_the_state_is_the_tensors_of_the_file(cache: bool, checkpoint: Checkpoint, tmp_path: Path) -> None:
    first = quantized(checkpoint)
    other = quantized(replace(checkpoint, tensors={n: 2 * t for n, t in checkpoint.tensors.items()}))
    network, _ = loaded(first, tmp_path, cache)
    state = network.state_dict()
    stored = {part_name(n, part): t for n, p in first.packed.items() for part, t in p.parts.items()}
    assert {n.removesuffix(".data"): t.tolist() for n, t in state.items()} == {n: t.tolist() for n, t in stored.items()}
    network(*inputs())
    network.load_state_dict(loaded(other, tmp_path)[0].state_dict())
    assert same_output(network, other.network())


def test_packed_tensors_that_are_not_the_networks_are_refused() -> None:
    full = {"weight": pack_tensor(torch.ones(2, 3), get_format("int4"), PerTensor())}
    bias = {"bias": pack_tensor(torch.ones(2), get_format("float16"), PerTensor())}
    for packed, message in (
        (full, "nothing is packed for bias"),
        ({**full, **bias, "more": full["weight"]}, "no parameter 'more'"),
        ({"weight": bias["bias"], **bias}, r"no parameter 'weight' of shape \(2,\)"),
    ):
        with pytest.raises(QuantizationError, match=message):
            hold_packed(nn.Linear(3, 2), packed)


# --- where they come from --------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_a_model_is_found_by_all_that_names_it(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    older, manifest = put(store, "checkpoint"), put(store, "quantized")
    store.give_name("small", manifest)
    folder = store.directory("quantized", manifest.id)
    expected = tiny_value("quantized").network()
    references = ["small", "latest", manifest.id, manifest.id[:6], f"quantized/{manifest.id}"]
    for ref in [*references, folder, str(folder), folder / "model.safetensors", str(folder / "model.safetensors")]:
        network: Any = fqdiff.load(ref, store=store.root)
        assert same_output(network, expected)
        assert network.spec == tiny_value("quantized").spec
    monkeypatch.setenv("FQDIFF_STORE", str(store.root))
    assert same_output(fqdiff.load("small"), expected)
    assert same_output(fqdiff.load(older.id), tiny_value("checkpoint").network())
    monkeypatch.delenv("FQDIFF_STORE")
    monkeypatch.chdir(tmp_path)
    os.rename(store.root, "fqdiff-store")
    assert same_output(fqdiff.load("small"), expected)


def test_a_link_to_a_file_is_followed_and_a_copied_folder_read(store: Store, tmp_path: Path) -> None:
    manifest = put(store, "quantized")
    link = tmp_path / "link.safetensors"
    link.symlink_to(store.directory("quantized", manifest.id) / "model.safetensors")
    copied = tmp_path / "copied"
    os.rename(store.directory("quantized", manifest.id), copied)
    link.unlink()
    link.symlink_to(copied / "model.safetensors")
    for path in (link, copied):
        assert same_output(fqdiff.load(path), tiny_value("quantized").network())


def test_a_path_is_told_from_a_reference_by_its_text() -> None:
    assert all(map(is_path, ["a.safetensors", "./a", "../a", ".", "/a", "a/b/", "store/quantized/abcd", Path("a")]))
    assert not any(map(is_path, ["a", "latest", "mnist-small", "a.b", "quantized/abcd", "checkpoint/abcd"]))


def refuse(ref: str | Path, kind: type[FqdiffError], match: str, store: Store | None = None) -> None:
    with pytest.raises(kind, match=match) as error:
        fqdiff.load(ref, store=store.root if store else None)
    assert error.value.hint
    assert len(str(error.value)) < 1000


def test_what_is_not_there_is_not_found(store: Store, tmp_path: Path) -> None:
    plan = put(store, "plan")
    refuse(tmp_path / "none.safetensors", ArtifactNotFound, "there is no file .*none.safetensors")
    refuse(tmp_path, ArtifactNotFound, "there is no file .*model.safetensors")
    refuse(store.directory("plan", plan.id), ArtifactNotFound, "there is no file .*model.safetensors")
    refuse("none", ArtifactNotFound, "no checkpoint or quantized is named 'none'", store)
    refuse(plan.id, ArtifactNotFound, f"is the plan {plan.id}, and another kind is asked for", store)
    refuse("latest", ArtifactNotFound, "no checkpoint or quantized in", store)


def test_files_that_are_no_models_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_model(tiny_value("quantized"), path)
    good = path.read_bytes()
    for content in (b"", b"text", good[:-1], good[: len(good) // 2], b"\x80\x04N."):
        path.write_bytes(content)
        refuse(path, ArtifactCorrupt, "model.safetensors is not a readable safetensors file")
    save_file({"weight": torch.zeros(3)}, path)
    refuse(path, ArtifactCorrupt, "is not a model: 'quantized' is missing")
    path.write_bytes(good.replace(b"cosine", b"cosinE"))
    refuse(path, ArtifactCorrupt, "cosinE")
    refuse("a\0.safetensors", ArtifactCorrupt, "null")


def test_damage_is_found_by_the_hash_in_a_store_and_in_its_folder(store: Store) -> None:
    """One byte of a code changed: nothing but the hash could tell."""
    manifest = put(store, "quantized")
    folder = store.directory("quantized", manifest.id)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    refuse(manifest.id, ArtifactCorrupt, "is damaged: sha256", store)
    refuse(folder, ArtifactCorrupt, "is damaged: sha256")


def test_importing_fqdiff_imports_no_torch() -> None:
    code = "import sys, fqdiff; assert callable(fqdiff.load); assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
