from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fqdiff.configs import PlanConfig, QuantizeConfig
from fqdiff.context import Context
from fqdiff.errors import ArtifactCorrupt, ConfigError, LineageError, NumericalError, QuantizationError
from fqdiff.quant.formats import get_format, parse_granularity
from fqdiff.quant.packed import stored_bytes, unpack_tensor
from fqdiff.stages.plan import mean_minus_deviations, plan, read_scores
from fqdiff.stages.quantize import quantize
from fqdiff.store.model_files import load_quantized, save_quantized
from fqdiff.values import Checkpoint, FisherTable, Plan

CONFIGS = {
    "groups": PlanConfig(),
    "ratio": PlanConfig("ratio", ratio=0.25, low="int4", high="int8", at="mean"),
    "mean-std": PlanConfig("mean-std", low="bfloat16"),
    "threshold": PlanConfig("threshold", threshold=1e-3, low="int3", granularity="tensor"),
    "uniform": PlanConfig("uniform", low="int4"),
    "symmetric groups": PlanConfig(
        "ratio", low="int3", high="int8", granularity="group-near:12", symmetric=True, scale="float16"
    ),
    "ternary": PlanConfig("uniform", low="ternary", granularity="group-near:8", scale="float16"),
    "float8": PlanConfig("mean-std", low="float8_e5m2", high="float8_e4m3", scale="float16"),
    "float8 per tensor": PlanConfig("uniform", low="float8_e4m3", granularity="tensor"),
}


def make(checkpoint: Checkpoint, table: FisherTable, config: PlanConfig) -> Plan:
    return plan(checkpoint, table, None, config, 0, Context())


def weights(made: Plan, block: str) -> dict[str, str]:
    return {e.parameter: e.format for e in made.entries if e.block == block and len(e.shape) >= 2}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_planned_kept_ones_included(
    checkpoint: Checkpoint, fisher_table: FisherTable, name: str
) -> None:
    made = make(checkpoint, fisher_table, CONFIGS[name])
    assert [e.parameter for e in made.entries] == list(checkpoint.tensors)
    assert all(e.rule and e.bytes > 0 for e in made.entries)
    assert {e.format for e in made.entries if len(e.shape) < 2} == {"float32"}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_file_has_the_planned_size_to_the_byte(
    checkpoint: Checkpoint, fisher_table: FisherTable, tmp_path: Path, name: str
) -> None:
    made = make(checkpoint, fisher_table, CONFIGS[name])
    save_quantized(quantize(checkpoint, made, None, QuantizeConfig(), 0, Context()), tmp_path)
    path = tmp_path / "model.safetensors"
    assert path.stat().st_size == made.file_bytes
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert header + sum(e.bytes for e in made.entries) == made.file_bytes
    assert made.bits_per_weight == pytest.approx(8 * made.file_bytes / made.parameters)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_quantized_checkpoint_loads_back_bit_exactly(
    checkpoint: Checkpoint, fisher_table: FisherTable, tmp_path: Path, name: str
) -> None:
    made = quantize(checkpoint, make(checkpoint, fisher_table, CONFIGS[name]), None, QuantizeConfig(), 0, Context())
    save_quantized(made, tmp_path)
    loaded = load_quantized(tmp_path)
    assert loaded.spec == made.spec
    assert loaded.packed.keys() == made.packed.keys()
    for parameter, packed in made.packed.items():
        assert torch.equal(unpack_tensor(loaded.packed[parameter]), unpack_tensor(packed))
    assert dict(loaded.network().named_parameters()).keys() == checkpoint.tensors.keys()


def test_the_file_opens_with_plain_safetensors(
    checkpoint: Checkpoint, fisher_table: FisherTable, tmp_path: Path
) -> None:
    save_quantized(
        quantize(checkpoint, make(checkpoint, fisher_table, CONFIGS["uniform"]), None, QuantizeConfig(), 0, Context()),
        tmp_path,
    )
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("block4.res1.conv1.weight.codes").dtype == torch.uint8
        assert file.get_tensor("block4.res1.conv1.weight.codes").numel() == 32 * 32 * 9 // 2
        assert file.get_tensor("block4.res1.conv1.weight.scale").shape == (32,)


def test_group_thresholds_are_the_groups_mean_fisher_values(checkpoint: Checkpoint, fisher_table: FisherTable) -> None:
    made = make(checkpoint, fisher_table, PlanConfig(groups="12/345/6"))
    scores = read_scores(fisher_table, "1")
    for blocks in ("12", "345", "6"):
        members = [e for e in made.entries if e.block in blocks and len(e.shape) >= 2]
        mean = sum(scores[e.parameter] for e in members) / len(members)
        assert all(e.threshold == pytest.approx(mean) for e in members)
        assert all((e.format == "float16") == (scores[e.parameter] < mean) for e in members)
        assert {e.format for e in members} == {"float16", "float32"}


def test_given_thresholds_replace_the_means(checkpoint: Checkpoint, fisher_table: FisherTable) -> None:
    made = make(checkpoint, fisher_table, PlanConfig(thresholds=(0.0, 1e30, 0.0)))
    assert set(weights(made, "2").values()) == {"float32"}
    assert set(weights(made, "4").values()) == {"float16"}
    with pytest.raises(ConfigError, match="2 thresholds for 3 groups"):
        PlanConfig(thresholds=(0.0, 1.0))


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 1.0])
def test_the_ratio_keeps_the_tensors_with_the_highest_values(
    checkpoint: Checkpoint, fisher_table: FisherTable, ratio: float
) -> None:
    made = make(checkpoint, fisher_table, PlanConfig("ratio", ratio=ratio, low="int4"))
    scores = read_scores(fisher_table, "1")
    for block in "123456":
        formats = weights(made, block)
        kept = {name for name, fmt in formats.items() if fmt == "float32"}
        assert kept == set(sorted(formats, key=lambda name: -scores[name])[: round(ratio * len(formats))])


def test_the_mean_std_rule_is_the_published_formula() -> None:
    scores = {f"w{i}": v for i, v in enumerate([1.0, 2.0, 6.0])} | {f"x{b}": 1.0 for b in range(2, 7)}
    blocks = {name: ("1" if name[0] == "w" else name[1]) for name in scores}
    values = {name: torch.tensor([score], dtype=torch.float64) for name, score in scores.items()}
    rules = mean_minus_deviations(values, blocks, PlanConfig("mean-std", mean_std=0.5))
    mean, std = 3.0, (14 / 3) ** 0.5
    assert rules["w0"][0][0] == pytest.approx(mean - 0.5 * mean / std * std)
    loose = mean_minus_deviations(values, blocks, PlanConfig("mean-std", mean_std=100.0))
    assert loose["w0"][0][0] == pytest.approx(mean - 2.0 * std)


def test_a_single_threshold_rules_every_block(checkpoint: Checkpoint, fisher_table: FisherTable) -> None:
    scores = read_scores(fisher_table, "1")
    middle = sorted(scores.values())[len(scores) // 2]
    made = make(checkpoint, fisher_table, PlanConfig("threshold", threshold=middle))
    for entry in made.entries:
        if entry.block in "123456" and len(entry.shape) >= 2:
            assert (entry.format == "float16") == (scores[entry.parameter] < middle)


def test_stem_and_head_stay_high_but_for_uniform(checkpoint: Checkpoint, fisher_table: FisherTable) -> None:
    mixed = make(checkpoint, fisher_table, PlanConfig("threshold", threshold=1e30, low="int4", high="int8"))
    assert set(weights(mixed, "stem").values()) == set(weights(mixed, "head").values()) == {"int8"}
    uniform = plan(checkpoint, None, None, PlanConfig("uniform", low="int4"), 0, Context())
    assert set(weights(uniform, "stem").values()) == set(weights(uniform, "head").values()) == {"int4"}


def test_transposed_convolutions_get_scales_per_output_channel(
    checkpoint: Checkpoint, fisher_table: FisherTable
) -> None:
    made = {e.parameter: e.granularity for e in make(checkpoint, fisher_table, CONFIGS["uniform"]).entries}
    assert made["block4.resample.weight"] == "channel:1"
    assert made["block1.resample.weight"] == "channel:0"


# Weights of an output channel: 9 in the stem, 8 and 24 in attention, 36, 72, 144 ... in 3x3 kernels, 32 ... elsewhere.
FOURS = PlanConfig("threshold", threshold=1e30, low="int4", granularity="group:4", scale="float16")


def test_groups_stay_within_output_channels(checkpoint: Checkpoint, fisher_table: FisherTable) -> None:
    made = {e.parameter: e for e in make(checkpoint, fisher_table, FOURS).entries}
    assert made["block1.resample.weight"].granularity == "group:4:0:float16"
    assert made["block4.resample.weight"].granularity == "group:4:1:float16"  # a transposed convolution
    weights = prod(made["block4.resample.weight"].shape)
    assert made["block4.resample.weight"].bytes == weights // 2 + 2 * weights // 4 + weights // 8


def test_a_channel_smaller_than_a_group_is_one_group(checkpoint: Checkpoint, fisher_table: FisherTable) -> None:
    made = make(checkpoint, fisher_table, replace(FOURS, granularity="group:512"))
    assert {e.granularity for e in made.entries} == {"tensor", "channel:0:float16", "channel:1:float16"}


def test_a_group_size_that_does_not_divide_names_those_that_do(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="groups of 5 do not divide the 9 weights") as caught:
        plan(checkpoint, None, None, PlanConfig("uniform", low="int4", granularity="group:5"), 0, Context())
    assert "'stem.conv.weight'" in caught.value.message
    assert caught.value.hint == "sizes that do: 1, 3, 9; or group-near:5 takes the nearest for each tensor"


def test_the_nearest_group_size_is_chosen_tensor_by_tensor(checkpoint: Checkpoint) -> None:
    config = PlanConfig("uniform", low="int4", granularity="group-near:16")
    grains = {e.parameter: e.granularity for e in plan(checkpoint, None, None, config, 0, Context()).entries}
    assert grains["stem.conv.weight"] == "channel:0"  # 9 weights
    assert grains["stem.time.linear1.weight"] == "group:16:0"  # 32
    assert grains["block1.res1.conv1.weight"] == "group:18:0"  # 36: 18 is nearer than 12
    assert grains["block6.attention.qkv.weight"] == "group:12:0"  # 24


def test_symmetric_turns_every_integer_format_into_the_row_without_zero_points(
    checkpoint: Checkpoint, fisher_table: FisherTable
) -> None:
    asymmetric = PlanConfig("ratio", low="int4", high="int8")
    plain, symmetric = (
        make(checkpoint, fisher_table, config) for config in (asymmetric, replace(asymmetric, symmetric=True))
    )
    assert {e.format for e in symmetric.entries} == {"float32", "int4sym", "int8sym"}
    assert [e.format.removesuffix("sym") for e in symmetric.entries] == [e.format for e in plain.entries]
    assert symmetric.file_bytes < plain.file_bytes
    assert replace(symmetric, strategy="") == replace(
        make(checkpoint, fisher_table, replace(asymmetric, low="int4sym", high="int8sym")), strategy=""
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"symmetric": True}, "symmetric says nothing about float16 and float32"),
        ({"low": "int3", "high": "int2"}, "low int3 has more bits than high int2"),
        ({"scale": "float16"}, "float16 and float32 have no scales"),
        ({"granularity": "group:32"}, "float16 and float32 have no scales to share by group:32"),
        ({"strategy": "uniform", "low": "bfloat16", "granularity": "tensor"}, "bfloat16 have no scales to share"),
        ({"strategy": "uniform", "low": "ternary", "high": "int8", "symmetric": True}, "nothing about ternary"),
    ],
)
def test_a_setting_without_a_use_is_refused(checkpoint: Checkpoint, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(checkpoint, None, None, PlanConfig(**changes), 0, Context())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [{"granularity": g} for g in ("group", "group:0", "group:32:0", "group-near", "group:\u0663")]
    + [{"scale": "bfloat16"}],
)
def test_an_unknown_granularity_or_scale_is_refused(changes: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="unknown"):
        PlanConfig(**changes)  # type: ignore[arg-type]


def test_scores_at_mean_average_the_timesteps(fisher_table: FisherTable) -> None:
    name = "block1.res1.conv1.weight"
    assert read_scores(fisher_table, "mean")[name] == pytest.approx(float(fisher_table.entries[name].mean.mean()))
    assert read_scores(fisher_table, "1")[name] == float(fisher_table.entries[name].mean[1])


def test_a_timestep_the_table_lacks_is_named_with_its_nearest(fisher_table: FisherTable) -> None:
    every_tenth = replace(fisher_table, timesteps=fisher_table.timesteps * 10)
    with pytest.raises(ConfigError, match="no timestep 17") as caught:
        read_scores(every_tenth, "17")
    assert "--at 20" in caught.value.hint


def test_a_table_with_nan_is_refused(checkpoint: Checkpoint, fisher_table: FisherTable) -> None:
    name = "block1.res1.conv1.weight"
    broken = {**fisher_table.entries, name: replace(fisher_table.entries[name], mean=torch.full((1000,), float("nan")))}
    with pytest.raises(NumericalError, match="block1"):
        make(checkpoint, replace(fisher_table, entries=broken), PlanConfig())


def test_a_table_of_another_model_is_refused(checkpoint: Checkpoint, fisher_table: FisherTable) -> None:
    entries = dict(fisher_table.entries)
    entries.pop("head.output.bias")
    with pytest.raises(LineageError, match="another model"):
        make(checkpoint, replace(fisher_table, entries=entries), PlanConfig())


def test_a_strategy_without_fisher_values_says_what_to_do(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match="needs Fisher"):
        plan(checkpoint, None, None, PlanConfig(), 0, Context())


def test_a_plan_for_another_model_is_refused(checkpoint: Checkpoint, fisher_table: FisherTable) -> None:
    made = make(checkpoint, fisher_table, PlanConfig())
    with pytest.raises(LineageError, match="another model"):
        quantize(checkpoint, replace(made, entries=made.entries[1:]), None, QuantizeConfig(), 0, Context())


def test_nan_weights_are_refused_when_quantizing(checkpoint: Checkpoint) -> None:
    made = plan(checkpoint, None, None, CONFIGS["uniform"], 0, Context())
    broken = {
        **checkpoint.tensors,
        "stem.conv.weight": torch.full_like(checkpoint.tensors["stem.conv.weight"], float("nan")),
    }
    with pytest.raises(QuantizationError, match=r"'stem\.conv\.weight'.*NaN"):
        quantize(replace(checkpoint, tensors=broken), made, None, QuantizeConfig(), 0, Context())


def test_infinite_weights_are_no_overflow_of_a_cast(checkpoint: Checkpoint) -> None:
    """Rejects the advice to use a wider format, which no such weight fits either."""
    made = plan(checkpoint, None, None, PlanConfig("uniform", low="float16"), 0, Context())
    bias = checkpoint.tensors["stem.conv.bias"]
    for value in (float("nan"), float("inf")):
        broken = {**checkpoint.tensors, "stem.conv.bias": torch.full_like(bias, value)}
        with pytest.raises(QuantizationError, match=r"'stem\.conv\.bias'.*NaN or infinity") as error:
            quantize(replace(checkpoint, tensors=broken), made, None, QuantizeConfig(), 0, Context())
        assert "bfloat16" not in error.value.hint
    large = {**checkpoint.tensors, "stem.conv.weight": torch.full_like(checkpoint.tensors["stem.conv.weight"], 1e6)}
    with pytest.raises(QuantizationError, match=r"'stem\.conv\.weight': values up to 1e\+06 in float16"):
        quantize(replace(checkpoint, tensors=large), made, None, QuantizeConfig(), 0, Context())


@pytest.mark.parametrize("promise", [2, -2])
def test_a_plan_whose_entries_do_not_make_the_promised_file_is_refused(checkpoint: Checkpoint, promise: int) -> None:
    made = plan(checkpoint, None, None, CONFIGS["uniform"], 0, Context())
    with pytest.raises(ArtifactCorrupt, match=f"promises a file of {made.file_bytes + promise:,} bytes"):
        quantize(checkpoint, replace(made, file_bytes=made.file_bytes + promise), None, QuantizeConfig(), 0, Context())


def test_a_tensor_that_was_made_larger_in_its_plan_is_refused(checkpoint: Checkpoint) -> None:
    """An entry changed so that it fits itself; rejects a reader that holds against it no more than the entry's own bytes."""
    made = plan(checkpoint, None, None, PlanConfig("uniform", low="int3"), 0, Context())
    first = next(i for i, e in enumerate(made.entries) if e.format == "int3")
    entry = made.entries[first]
    wider = replace(entry, format="int4")
    size = stored_bytes(entry.shape, get_format("int4"), parse_granularity(entry.granularity))
    entries = (*made.entries[:first], replace(wider, bytes=size), *made.entries[first + 1 :])
    with pytest.raises(ArtifactCorrupt, match=f"make one of {made.file_bytes + size - entry.bytes:,}"):
        quantize(checkpoint, replace(made, entries=entries), None, QuantizeConfig(), 0, Context())


@pytest.mark.parametrize("setting", [{"rounding": "squant"}, {"ranges": ("mse",)}])
@pytest.mark.parametrize("fmt", ["codebook4", "ternary", "float16"])
def test_what_is_about_integer_codes_is_refused_where_there_are_none(
    checkpoint: Checkpoint, fmt: str, setting: dict[str, object]
) -> None:
    """Rejects plans that take it and round to the nearest, or span everything, all the same."""
    config = PlanConfig("uniform", low=fmt, **setting)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"is about integer codes, and says nothing about {fmt}"):
        plan(checkpoint, None, None, config, 0, Context())


# --- ladders ---------------------------------------------------------------------------------------------------------

FOUR = ("float16", "int8", "int4", "int2")
PAPERS_RULES = ({}, {"strategy": "ratio"}, {"strategy": "mean-std"}, {"strategy": "threshold", "threshold": 1e-3})


@pytest.mark.parametrize("rule", PAPERS_RULES)
def test_a_ladder_of_two_is_high_and_low(
    checkpoint: Checkpoint, fisher_table: FisherTable, rule: dict[str, object]
) -> None:
    ladder = make(checkpoint, fisher_table, PlanConfig(**rule, ladder=("int8", "int4")))  # type: ignore[arg-type]
    assert ladder == make(checkpoint, fisher_table, PlanConfig(**rule, high="int8", low="int4"))  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", PAPERS_RULES)
def test_the_next_thresholds_of_a_ladder_are_steps_below_the_first(
    checkpoint: Checkpoint, fisher_table: FisherTable, rule: dict[str, object]
) -> None:
    """Rejects thresholds in the wrong order, and a value on a threshold that falls below it."""
    made = make(checkpoint, fisher_table, PlanConfig(**rule, ladder=FOUR, ladder_step=4.0))  # type: ignore[arg-type]
    ruled = [e for e in made.entries if e.threshold is not None]
    assert len(ruled) > 20
    for e in ruled:
        assert e.score is not None
        assert e.threshold is not None
        rungs = [e.score >= e.threshold, e.score >= e.threshold / 4, e.score >= e.threshold / 16, True]
        assert e.format == FOUR[rungs.index(True)]
        assert e.rule.endswith("each next threshold 4 times smaller")
    assert len({e.format for e in ruled}) > 2
    assert set(weights(made, "stem").values()) == {"float16"}


def test_all_thresholds_of_a_ladder_can_be_given(checkpoint: Checkpoint, fisher_table: FisherTable) -> None:
    scores = sorted(read_scores(fisher_table, "1").values(), reverse=True)
    first, second, third = scores[10], scores[25], scores[40]
    config = PlanConfig("threshold", threshold=first, lower_thresholds=(second, third), ladder=FOUR)
    for e in make(checkpoint, fisher_table, config).entries:
        if e.threshold is not None:
            assert e.score is not None
            assert e.format == FOUR[sum(e.score < t for t in (first, second, third))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ladder": ("int8",)}, "ladder int8"),
        ({"ladder": ("int8", "int8")}, "ladder int8,int8"),
        ({"ladder": ("int4", "int8")}, "ladder int4,int8"),
        ({"ladder": ("float16", "bfloat16")}, "ladder float16,bfloat16"),
        ({"ladder": ("float16", "int9")}, "unknown format 'int9'"),
        ({"ladder": FOUR, "low": "int3"}, "a ladder beside low and high"),
        ({"ladder": FOUR, "ladder_step": 1.0}, "ladder_step is 1"),
        ({"ladder": ("int8", "int4"), "ladder_step": 3.0}, "nothing about a ladder of two"),
        ({"ladder_step": 3.0}, "--ladder-step without a ladder"),
        ({"strategy": "uniform", "ladder": FOUR}, "no use for ladder"),
        ({"strategy": "budget", "target_bpw": 4.0, "ladder": FOUR}, "no use for ladder"),
        ({"strategy": "ratio", "ladder": FOUR, "lower_thresholds": (0.1, 0.01)}, "no use for several thresholds"),
        ({"strategy": "threshold", "threshold": 1.0, "ladder": FOUR, "lower_thresholds": (0.1,)}, "2 thresholds for 4"),
        (
            {"strategy": "threshold", "threshold": 1.0, "ladder": FOUR, "lower_thresholds": (0.1, 0.1)},
            "thresholds 1, 0.1, 0.1",
        ),
        (
            {
                "strategy": "threshold",
                "threshold": 1.0,
                "ladder": FOUR,
                "lower_thresholds": (0.1, 0.01),
                "ladder_step": 2.0,
            },
            "beside all thresholds",
        ),
    ],
)
def test_a_ladder_that_makes_no_sense_is_refused(
    checkpoint: Checkpoint, fisher_table: FisherTable, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(checkpoint, fisher_table, PlanConfig(**changes))  # type: ignore[arg-type]
