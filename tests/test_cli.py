import contextlib
import fcntl
import hashlib
import json
import os
import pty
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner, Result

import fqdiff
from fqdiff.cli.app import app
from fqdiff.cli.fid import fid_text
from fqdiff.pipeline import Runner
from fqdiff.store.store import Store
from tests.test_evidence import StandIn

COMMANDS = [
    ["train"], ["import"], ["fisher"], ["fisher", "top"], ["fisher", "merge"], ["fisher", "validate"], ["plan"],
    ["plan", "show"], ["plan", "diff"],
    ["calibrate"], ["quantize"], ["size"], ["sample"], ["fid"], ["compare"],
    ["plot", "fisher"], ["plot", "plan"], ["plot", "compare"], ["plot", "activations"],
    ["plot", "pareto"], ["plot", "samples"], ["report"],
    ["methods"],
    ["run"], ["sweep"],
    *(["store", name] for name in ("ls", "show", "lineage", "verify", "gc", "rm")),
]  # fmt: skip


def call(store: Path, *arguments: str) -> Result:
    return CliRunner(env={"FQDIFF_STORE": str(store), "COLUMNS": "200"}).invoke(app, list(arguments))


def good(store: Path, *arguments: str) -> dict[str, object]:
    result = call(store, *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, object] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store after the four calls of the README, on the tiny preset."""
    folder = tmp_path_factory.mktemp("cli") / "store"
    good(folder, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "20", "--name", "tiny-fp32")
    good(folder, "fisher", "--timesteps", "1000", "--samples", "2")
    good(folder, "plan", "--groups", "12/345/6", "--name", "by-groups")
    config = folder.parent / "quick.toml"
    config.write_text("[sample]\nsteps = 5\ncount = 40\n")
    good(folder, "fid", "--features", "digits", "--config", str(config))
    return folder


# --- surface ---------------------------------------------------------------------------------------------------------


def test_help_answers_at_once_and_imports_no_torch() -> None:
    script = "import sys, fqdiff.cli.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
    # Of the processor's time, which a busy machine does not stretch: help waits for nothing else.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "fqdiff", "--help"], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example(command: list[str], tmp_path: Path) -> None:
    result = call(tmp_path, *command, "--help")
    assert result.exit_code == 0
    assert "Example: fqdiff " + " ".join(command) in result.stdout
    assert "--json" in result.stdout


def test_the_version_is_printed(tmp_path: Path) -> None:
    assert call(tmp_path, "--version").stdout == f"fqdiff {fqdiff.__version__}\n"


def test_the_module_runs_as_the_command_does() -> None:
    result = subprocess.run([sys.executable, "-m", "fqdiff", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"fqdiff {fqdiff.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["trian"], ["train", "--steps", "many"], ["plan", "--ratio", "2"], ["sample", "--count", "0"]]
)
def test_wrong_usage_exits_with_2_and_says_so_on_stderr(arguments: list[str], tmp_path: Path) -> None:
    result = call(tmp_path, *arguments)
    assert result.exit_code == 2
    assert result.stderr
    assert not result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["plan"], 1, "no fisher in"),
        (["sample", "nothing"], 1, "is named 'nothing'"),
        (["train", "--preset", "huge"], 2, "unknown preset 'huge'"),
        (["train", "--dataset", "imagenet"], 2, "unknown data set 'imagenet'"),
        (["train", "--dataset", "folder:/no/such/folder"], 1, "is not a folder"),
        (["train", "--device", "tpu"], 2, "device 'tpu' is not available"),
        (["train", "--dataset", "mnist5k", "--preset", "tiny", "--name", "../up"], 2, "cannot be a name"),
        (["train", "--dataset", "mnist5k", "--preset", "tiny", "--image-size", "20"], 2, "not a multiple of 8"),
        (["plan", "--groups", "12/345/6", "--ratio", "0.5"], 2, "different strategies"),
        (["run", "huge"], 2, "unknown size 'huge'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_a_hint_and_changes_nothing(
    arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    result = call(tmp_path / "store", *arguments, "--json")
    assert result.exit_code == code
    errors = [line for line in result.stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert message in errors[0]
    assert len(errors) == 2
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "store").glob("*/*/manifest.json"))


def test_the_paper_presets_parameters_are_printed(tmp_path: Path) -> None:
    data = good(tmp_path, "train", "--preset", "paper", "--dataset", "mnist5k", "--dry-run")
    assert data["parameters"] == 35_178_689
    assert data["estimated_seconds"] > 0
    assert not list(tmp_path.iterdir())


# --- the pipeline ----------------------------------------------------------------------------------------------------


def test_the_four_calls_leave_every_artifact(store: Path) -> None:
    kinds = sorted(m.kind for m in Store(store).manifests())
    assert kinds == sorted(
        ["dataset", "checkpoint", "fisher", "plan", "quantized", "samples", "samples", "features", "metrics"]
    )


def test_asking_again_finds_what_is_there(store: Path) -> None:
    before = [m.id for m in Store(store).manifests()]
    result = call(store, "fisher", "tiny-fp32", "--samples", "2")
    assert "found fisher" in result.stderr
    assert [m.id for m in Store(store).manifests()] == before


def test_a_quantized_file_has_the_promised_size(store: Path) -> None:
    data = good(store, "quantize", "by-groups")
    assert data["file_bytes"] == data["promised_bytes"] == Path(str(data["file"])).stat().st_size


def test_quantize_copies_the_file_and_overwrites_nothing(store: Path, tmp_path: Path) -> None:
    target = tmp_path / "small.safetensors"
    data = good(store, "quantize", "by-groups", "--output", str(target))
    assert target.read_bytes() == Path(str(data["file"])).read_bytes()
    assert call(store, "quantize", "by-groups", "--output", str(target)).exit_code == 2


def test_a_result_names_all_it_depends_on(store: Path) -> None:
    (metrics,) = Store(store).manifests("metrics")
    data = json.loads((Store(store).directory("metrics", metrics.id) / "metrics.json").read_text())
    assert (data["n"], data["features"], data["dimension"], data["seed"]) == (40, "digits", 84, 0)
    assert len(data["features_sha256"]) == 64
    assert data["reference"] == "mnist5k, 40 of 1000 held-out images"
    assert {i.role for i in metrics.recipe.inputs} == {"samples", "dataset", "features", "baseline"}
    low, high = data["interval"]
    assert low <= data["difference"] <= high


def test_inception_features_are_named_with_the_hash_of_their_weights(store: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    torch.jit.script(StandIn()).save(str(weights))
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    (samples, *_) = Store(copy).manifests("samples")
    data = good(
        copy, "fid", samples.id, "--features", "inception", "--inception-weights", str(weights), "--count", "10"
    )
    assert (data["features"], data["dimension"], data["n"]) == ("inception-clean", 2048, 10)
    assert {m["metric"] for m in data["measures"]} >= {"fid", "kid", "inception_score"}  # type: ignore[attr-defined]
    assert data["features_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [((-1.0, 0.5), ": not distinguishable"), ((0.1, 0.5), ": worse"), ((-2.0, -0.1), "lower is no gain")],
)
def test_a_difference_is_put_in_words(store: Path, interval: tuple[float, float], verdict: str) -> None:
    (manifest,) = Store(store).manifests("metrics")
    value = Runner(Store(store)).load(manifest)
    last = fid_text(manifest, replace(value, difference=sum(interval) / 2, interval=interval)).splitlines()[-1]
    assert verdict in last


def test_a_difference_to_other_noise_is_called_that_and_blames_no_model(store: Path) -> None:
    """Rejects "moved away" of one model drawn twice."""
    (manifest,) = Store(store).manifests("metrics")
    value = replace(Runner(Store(store)).load(manifest), difference=-1.0, interval=(-2.0, -0.1), image_error=None)
    assert fid_text(manifest, value).splitlines()[-1].endswith("95 %: not worse")
    assert "other noise, resampled apart" in fid_text(manifest, value)
    assert "moved away" not in fid_text(manifest, value)


def test_lineage_leads_from_the_number_to_the_data(store: Path) -> None:
    chain = good(store, "store", "lineage", "latest")["lineage"]
    assert isinstance(chain, list)
    kinds = {entry["artifact"].split("/")[0] for entry in chain}
    assert kinds == {"metrics", "samples", "quantized", "checkpoint", "dataset", "fisher", "plan", "features"}
    assert all(entry["there"] for entry in chain)


def test_the_latest_artifact_is_taken_and_named(store: Path) -> None:
    result = call(store, "plan", "--uniform", "int4", "--dry-run")
    assert "checkpoint: the latest" in result.stderr
    assert "(tiny-fp32)" in result.stderr


def test_a_plan_can_start_from_a_checkpoint(store: Path) -> None:
    assert good(store, "plan", "tiny-fp32", "--groups", "12/345/6")["id"] == Store(store).resolve("by-groups").id


def test_plans_print_block_by_block(store: Path) -> None:
    text = call(store, "plan", "by-groups"[:0] or "--groups", "12/345/6").stdout
    assert "float16" in text
    assert "bits per weight" in text
    assert "group 345: its mean Fisher value" in text


def test_granularity_scale_dtype_and_symmetry_reach_the_file(store: Path, tmp_path: Path) -> None:
    options = ["--granularity", "group-near:32", "--scale", "float16", "--symmetric"]
    planned = good(store, "plan", "--ratio", "0.5", "--low", "int3", "--high", "int8", *options)
    made = good(store, "quantize", str(planned["id"]), "--output", str(tmp_path / "small.safetensors"))
    assert made["file_bytes"] == made["promised_bytes"] == planned["file_bytes"]
    assert (tmp_path / "small.safetensors").stat().st_size == planned["file_bytes"]
    with safe_open(tmp_path / "small.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["fqdiff"])["quantized"]["block1.res1.conv1.weight"]
        assert facts["granularity"] == "channel:0:float16"  # 36 weights: 36 is nearer to 32 than 18
        assert facts["format"] in ("int3sym", "int8sym")
        assert file.get_tensor("block1.res1.conv1.weight.scale").dtype == torch.float16
    blocks: Any = planned["blocks"]
    assert sum(row["tensors_low"] for row in blocks) > 20
    config = tmp_path / "plan.toml"
    config.write_text(
        '[plan]\nlow = "int3"\nhigh = "int8"\ngranularity = "group-near:32"\nscale = "float16"\nsymmetric = true\n'
    )
    assert good(store, "plan", "--ratio", "0.5", "--config", str(config))["id"] == planned["id"]


@pytest.mark.parametrize(
    "planning",
    [
        None,
        ["--uniform", "int4"],
        ["--uniform", "ternary", "--granularity", "group-near:32", "--scale", "float16"],
        ["--ratio", "0.5", "--low", "int3", "--high", "float8_e4m3", "--symmetric"],
        ["--groups", "12/345/6", "--low", "bfloat16"],
        ["--threshold", "0.01,0.001,0.0001", "--ladder", "float16,int8,int4,int2"],
    ],
)
def test_the_sizes_by_block_tensor_and_kind_add_up_to_the_file(store: Path, planning: list[str] | None) -> None:
    """Against the file itself: its length, its header's, and its tensors as the header lists them."""
    ref = "tiny-fp32"
    if planning is not None:
        ref = str(good(store, "quantize", str(good(store, "plan", *planning)["id"]))["id"])
    found: Any = good(store, "size", ref)
    content = Path(found["file"]).read_bytes()
    header_bytes = 8 + int.from_bytes(content[:8], "little")
    assert found["file_bytes"] == len(content) == sum(found["kinds"].values())
    assert found["kinds"]["header"] == header_bytes
    for rows in (found["blocks"], found["tensors"]):
        assert header_bytes + sum(row["bytes"] for row in rows) == len(content)
        assert sum(row["weights"] for row in rows) == found["weights"]
        for kind in ("codes", "scales", "zero_points", "kept"):
            assert sum(row[kind] for row in rows) == found["kinds"][kind]
    assert found["bits_per_weight"] == pytest.approx(8 * len(content) / found["weights"])
    listed = {n: e["data_offsets"] for n, e in json.loads(content[8:header_bytes]).items() if n != "__metadata__"}
    parts = {"codes": ".codes", "scales": ".scale", "zero_points": ".zero_point", "kept": ""}
    for row in found["tensors"]:
        for kind, ending in parts.items():
            begin, end = listed.pop(row["tensor"] + ending, (0, 0))
            assert row[kind] == end - begin
    assert not listed


def test_kept_elements_are_counted_to_the_byte(store: Path, tmp_path: Path) -> None:
    own = tmp_path / "store"
    shutil.copytree(store, own)
    table = str(
        good(own, "fisher", "tiny-fp32", "--timesteps", "10", "--samples", "2", "--granularity", "weight")["id"]
    )
    rule = ("--ratio", "0.03", "--at", "mean", "--low", "int3", "--high", "float16")
    planned: Any = good(own, "plan", table, *rule, "--granularity", "element")
    assert 0 < sum(row["weights_low"] for row in planned["blocks"]) < sum(row["weights"] for row in planned["blocks"])
    made = good(own, "quantize", str(planned["id"]))
    assert made["file_bytes"] == made["promised_bytes"] == planned["file_bytes"]
    found: Any = good(own, "size", str(made["id"]))
    assert found["file_bytes"] == Path(found["file"]).stat().st_size == sum(found["kinds"].values())
    assert found["kinds"]["index"] > 0
    assert found["kinds"]["kept_elements"] > 0
    assert "kept elements" in call(own, "size", str(made["id"])).stdout
    assert "single elements stay float16" in call(own, "plan", table, *rule, "--granularity", "element").stdout
    assert "element:" in call(own, "plan", "show", str(planned["id"])).stdout
    good(own, "plan", table, "--target-bpw", "8", "--granularity", "channel,element", "--formats", "float16,int3")


def test_sizes_for_people_end_with_the_header_and_the_file(store: Path) -> None:
    made = good(store, "quantize", str(good(store, "plan", "--uniform", "int4")["id"]))
    blocks = call(store, "size", str(made["id"])).stdout
    assert f"{made['file_bytes']:,}" in blocks.splitlines()[-1]
    assert [line.split()[0] for line in blocks.splitlines()[-3:]] == ["head", "header", "file"]
    tensors = call(store, "size", str(made["id"]), "--tensors").stdout
    assert re.search(r"block1\.res1\.conv1\.weight +1 +int4 +channel:0 +144 +72 +16 +2 +0 +0 +90 +5\.000", tensors)
    assert call(store, "size", "by-groups").exit_code == 1


def test_a_group_with_a_block_twice_is_named(store: Path) -> None:
    result = call(store, "plan", "--groups", "12/34/456")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-2:] == [
        "error: block 4 is in two groups of '12/34/456'",
        "hint: list each block once, e.g. --groups 12/345/6 or 1-2/3-5/6",
    ]


def test_dry_runs_make_nothing(store: Path) -> None:
    before = [m.id for m in Store(store).manifests()]
    for command in (["fisher", "--samples", "5"], ["plan", "--ratio", "0.3"], ["sample", "--count", "7"], ["quantize"]):
        assert "id" in good(store, *command, "--dry-run")
    assert [m.id for m in Store(store).manifests()] == before


def test_flags_go_before_the_file_and_the_file_before_defaults(store: Path, tmp_path: Path) -> None:
    config = tmp_path / "fqdiff.toml"
    config.write_text("[sample]\nsteps = 7\ncount = 9\n")
    chosen = good(store, "sample", "tiny-fp32", "--config", str(config), "--steps", "3", "--dry-run")["config"]
    assert chosen == {"sampler": "ddim", "steps": 3, "eta": 0.0, "count": 9}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sample]\nstep = 7\n", "unknown setting 'step' in [sample]"),
        ("[samples]\nsteps = 7\n", "'samples' in"),
        ('[sample]\nsteps = "7"\n', "sample.steps is '7'"),
        ("[sample\n", "cannot be read"),
    ],
)  # fmt: skip
def test_a_wrong_config_file_is_named(store: Path, tmp_path: Path, text: str, message: str) -> None:
    config = tmp_path / "fqdiff.toml"
    config.write_text(text)
    result = call(store, "sample", "--config", str(config))
    assert result.exit_code == 2
    assert message in result.stderr


def test_force_makes_it_again_with_the_same_bits(store: Path) -> None:
    plan = Store(store).resolve("by-groups")
    first = good(store, "quantize", "by-groups")
    again = good(store, "quantize", "by-groups", "--force")
    assert again["id"] == first["id"]
    created = Store(store).resolve(str(first["id"]))
    assert created.created > plan.created
    verify = good(store, "store", "verify")
    assert verify["damaged"] == []


def test_a_damaged_store_fails_its_verification(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    damaged = Store(copy).resolve("by-groups")
    path = Store(copy).directory(damaged.kind, damaged.id) / "plan.json"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(bytes(content))
    result = call(copy, "store", "verify")
    assert result.exit_code == 1
    assert str(path) in result.stdout
    assert call(copy, "quantize", "by-groups", "--force").exit_code == 1


def test_the_whole_chain_runs_ends_in_a_table_and_continues(tmp_path: Path) -> None:
    store = tmp_path / "store"
    planned = good(store, "run", "tiny", "--dry-run")["steps"]
    assert isinstance(planned, list)
    assert not any(step["exists"] for step in planned)
    data = good(store, "run", "tiny")
    models = data["models"]
    assert isinstance(models, list)
    assert [m["model"] for m in models] == [
        "FP32", "bfloat16 by groups 12/345/6", "int8", "int4", "Fisher budget, 4.25 bits", "FP32, other noise",
    ]  # fmt: skip
    for m in models:
        manifest = Store(store).resolve(m["id"])
        assert (
            m["file_bytes"] == (Store(store).directory(manifest.kind, manifest.id) / "model.safetensors").stat().st_size
        )
    sizes = [m["file_bytes"] for m in models[:5]]
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3]
    assert 0.99 * 4.25 < models[4]["bits_per_weight"] <= 4.25
    assert Path(str(data["picture"])).read_bytes()[:4] == b"\x89PNG"
    assert {step["id"] for step in planned} == {m.id for m in Store(store).manifests()}
    again = call(store, "run", "tiny")
    assert "making" not in again.stderr
    assert "noise alone moves FID by" in again.stdout


def interrupted(store: Path, arguments: list[str], line: str) -> tuple[int, str]:
    """Exit code and stderr of a command that gets Ctrl-C a second after it printed ``line``."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fqdiff", *arguments, "--store", str(store)], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    seen = ""
    while line not in seen:
        read = process.stderr.readline()
        assert read, seen
        seen += read
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    return process.wait(timeout=30), process.stderr.read()


def test_an_interrupt_after_training_in_the_same_process_comes_at_once(tmp_path: Path) -> None:
    """The soft stop of training must not swallow it."""
    code, text = interrupted(tmp_path / "store", ["run", "tiny"], "fisher: making")
    assert code == 130
    assert "Traceback" not in text
    assert [m.kind for m in Store(tmp_path / "store").manifests()] == ["dataset", "checkpoint"]


def test_a_sampling_interrupted_exits_with_130(tmp_path: Path) -> None:
    good(tmp_path / "store", "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "1")
    code, text = interrupted(tmp_path / "store", ["sample", "--sampler", "ddpm"], "making samples")
    assert code == 130
    assert "Traceback" not in text
    assert not list((tmp_path / "store").glob("samples/*"))


def test_progress_shows_loss_rate_and_time_left_on_a_terminal_only(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fqdiff", "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "60"]
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))
    process = subprocess.Popen([*command, "--store", str(tmp_path / "a")], stdout=subprocess.DEVNULL, stderr=terminal)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # how a terminal says that its last writer is gone
        while piece := os.read(master, 4096):
            shown += piece
    os.close(master)
    assert process.wait(timeout=30) == 0
    assert re.search(r"60/60 \[\d\d:\d\d<\d\d:\d\d, .*step/s, loss \d\.\d{4}\]", shown.decode())
    piped = subprocess.run([*command, "--store", str(tmp_path / "b")], capture_output=True, text=True, check=True)
    assert "step/s" not in piped.stderr


# --- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--uniform", "int8", "--at", "5"], "has no use for --at"),
        (["plan", "--ratio", "0.5", "--thresholds", "1/2/3"], "has no use for --thresholds"),
        (["plan", "--thresholds", "1/2"], "2 thresholds for 3 groups"),
        (["plan", "--threshold", "a,b"], "threshold 'a,b' is no number"),
        (["plan", "--threshold", "3,2"], "a --threshold of several without a ladder"),
        (["plan", "--uniform", "int4", "--granularity", "element"], "one format for all"),
        (["plan", "--low", "int4", "--granularity", "element"], "granularity element needs those of single weights"),
        (["plan", "--symmetric"], "symmetric says nothing about float16 and float32"),
        (["plan", "--uniform", "int4", "--granularity", "group:5"], "groups of 5 do not divide the 36 weights"),
        (["plan", "--uniform", "int9"], "unknown format 'int9'"),
        (["sample", "--sampler", "ddpm", "--eta", "0.5"], "eta is DDIM's"),
        (["train", "--resume", "--steps", "5"], "--resume continues the interrupted recipe"),
        (["train", "--resume", "--force"], "--resume continues the interrupted recipe"),
        (["train", "--preset", "tiny", "--weight-decay", "-1"], "weight_decay is -1.0"),
        (["fid", "--features", "inception", "--dry-run"], "has no id yet"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused_before_any_work(store: Path, arguments: list[str], message: str) -> None:
    before = [m.id for m in Store(store).manifests()]
    result = call(store, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert [m.id for m in Store(store).manifests()] == before


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("[train]\nclip_norm = -1.0\n", ["train", "--preset", "tiny"], "clip_norm is -1.0"),
        ('[train]\nimage_size = "x"\n', ["train", "--preset", "tiny"], "train.image_size is 'x'"),
        ('[plan]\nthresholds = ["a"]\n', ["plan"], "plan.thresholds is 'a'"),
        ("[plan]\nratio = 0.5\nthreshold = 1.0\n", ["plan"], "ratio and threshold belong to different"),
        ("[classifier]\nbatch_size = 0\n", ["fid", "--features", "digits"], "batch_size is 0"),
        ("[fid]\nresamples = 0\n", ["fid", "--features", "digits"], "resamples is 0"),
        ('[plan]\nlow = "int4"\n', ["run", "tiny"], "fixes plan itself"),
        ('[train]\ndataset = "mnist"\n', ["run", "tiny"], "fixes train.dataset itself"),
    ],
)  # fmt: skip
def test_settings_in_a_file_are_checked_like_flags(
    store: Path, tmp_path: Path, text: str, arguments: list[str], message: str
) -> None:
    config = tmp_path / "fqdiff.toml"
    config.write_text(text)
    result = call(store, *arguments, "--config", str(config), "--dry-run")
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_strategy_in_the_file_is_followed(store: Path, tmp_path: Path) -> None:
    config = tmp_path / "fqdiff.toml"
    config.write_text("[plan]\nratio = 0.5\n")
    chosen = good(store, "plan", "--config", str(config), "--dry-run")["config"]
    assert isinstance(chosen, dict)
    assert (chosen["strategy"], chosen["ratio"]) == ("ratio", 0.5)


def test_ddpm_takes_every_timestep_also_from_the_file(store: Path, tmp_path: Path) -> None:
    config = tmp_path / "fqdiff.toml"
    config.write_text('[sample]\nsampler = "ddpm"\n')
    for arguments in (["--config", str(config)], ["--sampler", "ddpm"]):
        chosen = good(store, "sample", "tiny-fp32", *arguments, "--dry-run")["config"]
        assert isinstance(chosen, dict)
        assert (chosen["sampler"], chosen["steps"]) == ("ddpm", 1000)


def test_a_dry_run_of_fid_makes_neither_samples_nor_baseline(store: Path) -> None:
    before = [m.id for m in Store(store).manifests()]
    assert good(store, "fid", "by-groups", "--features", "digits", "--dry-run")["exists"] is False
    assert [m.id for m in Store(store).manifests()] == before


def test_fid_refuses_what_it_cannot_finish_before_it_samples(tmp_path: Path) -> None:
    from PIL import Image

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for k in range(10):
        Image.new("L", (8, 8), 20 * k).save(pictures / f"{k}.png")
    store = tmp_path / "store"
    good(store, "train", "--preset", "tiny", "--dataset", f"folder:{pictures}", "--steps", "1")
    result = call(store, "fid", "--features", "digits")
    assert result.exit_code == 1
    assert "no labels" in result.stderr
    assert not list(Store(store).manifests("samples"))


def test_rm_says_what_it_would_refuse_and_removes_fellows_together(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    for extra in ([], ["--dry-run"]):
        result = call(copy, "store", "rm", "by-groups", *extra)
        assert result.exit_code == 1
        assert "was made from" in result.stderr
    every = [f"{m.kind}/{m.id}" for m in Store(copy).manifests()]
    assert good(copy, "store", "rm", *every, every[0])["removed"] == every
    assert not list(Store(copy).manifests())


def test_a_damaged_manifest_is_reported_beside_others_and_can_be_removed(store: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    broken = sorted(copy.glob("samples/*/manifest.json"))
    for path in broken:
        path.write_text("{")
    result = call(copy, "store", "verify")
    assert result.exit_code == 1
    assert all(str(path) in result.stdout for path in broken)
    for path in broken:
        assert call(copy, "store", "rm", f"samples/{path.parent.name}", "--force").exit_code == 0
    assert call(copy, "store", "verify").exit_code == 0
