"""The numbers in a cell's row: what its comparison has measured."""

from typing import Any

from fqdiff.sweep.tenths import TENTHS, mean_by_tenth
from fqdiff.values import Comparison, Plan

Row = dict[str, Any]
MODEL, BASELINE, FLOOR = "model1", "baseline", "floor"  # roles of a cell's comparison


def numbers(size: int, plan: Plan, value: Comparison) -> Row:
    """What a cell that is done has measured: its file's size in bytes, and what its comparison says."""
    fid, error = value.measure("fid", MODEL), value.measure("image_mse", MODEL)
    pair, floor = (value.pair("fid", of, BASELINE) for of in (MODEL, FLOOR))
    return {
        "bytes": size,
        "bits_per_weight": 8 * size / plan.parameters,
        "predicted": plan.budget.predicted if plan.budget is not None else None,
        "n": value.n,
        "level": value.level,
        "feature_network": value.features,
        "image_mse": error.value,
        "image_mse_low": error.low,
        "image_mse_high": error.high,
        "fid": fid.value,
        "fid_low": fid.low,
        "fid_high": fid.high,
        "fid_difference": pair.difference,
        "fid_difference_low": pair.low,
        "fid_difference_high": pair.high,
        "fid_p": pair.p,
        "fid_full": value.measure("fid", BASELINE).value,
        "fid_floor": value.measure("fid", FLOOR).value,
        "fid_floor_difference": floor.difference,
        "fid_floor_difference_low": floor.low,
        "fid_floor_difference_high": floor.high,
        "image_mse_floor": value.measure("image_mse", FLOOR).value,
    }


def noise_errors(value: Comparison, num_train_timesteps: int) -> Row:
    """The error of the noise that the model predicts, over all timesteps and each tenth; nothing where it was not measured."""
    curve = next((one for one in value.noise_error if one.of == MODEL), None)
    if curve is None:
        return {}
    by_tenth = mean_by_tenth(curve.points, num_train_timesteps)
    return {
        "noise_error": curve.mean,
        "noise_error_low": curve.low,
        "noise_error_high": curve.high,
        **dict(zip(TENTHS, by_tenth, strict=True)),
    }
