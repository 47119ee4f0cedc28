"""Noise correction: an injected error is found and undone exactly, and the sampler's variance stays what it should be."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fqdiff.calibration.inputs import CHUNK, CalibrationInputs
from fqdiff.calibration.ptqd import measure_correction
from fqdiff.configs import (
    ActivationConfig,
    CalibrateConfig,
    NoiseCorrectionConfig,
    PlanConfig,
    QuantizeConfig,
    SampleConfig,
)
from fqdiff.context import Context
from fqdiff.diffusion.samplers import ddim, ddpm, remaining_std, sampling_timesteps
from fqdiff.diffusion.schedule import make_schedule
from fqdiff.errors import ArtifactCorrupt, ConfigError, LineageError, NumericalError
from fqdiff.quant.container import file_bytes, stored_tensors
from fqdiff.quant.formats import PerTensor, get_format
from fqdiff.quant.noise_correction import NoiseCorrection, add_noise_correction, noise_correction_layout
from fqdiff.quant.packed import pack_tensor
from fqdiff.quant.phases import PhasedNetwork
from fqdiff.rng import generator
from fqdiff.stages.activations import quantize_activations
from fqdiff.stages.calibrate import calibrate
from fqdiff.stages.noise_correction import correct_noise
from fqdiff.stages.plan import plan
from fqdiff.stages.quantize import quantize
from fqdiff.stages.sample import sample
from fqdiff.store.model_files import load_quantized, quantized_metadata, save_quantized
from fqdiff.store.pretrained import open_model
from fqdiff.values import CalibrationSet, Checkpoint, QuantizedCheckpoint, error_std
from tests.test_bias_correction import rewrite
from tests.test_cli import call, good

TOTAL = 1000
SLOPE = torch.tensor([0.3, 0.1, 0.02, 0.0])
BIAS = torch.tensor([[0.5, -0.2, 0.1], [0.0, 0.3, -1.0], [0.25, 0.0, 0.0], [-0.1, 0.2, 0.4]])


def normal(*shape: int, label: str = "numbers") -> Tensor:
    return torch.randn(*shape, generator=generator(0, "test noise correction", label))


class Scaled(nn.Module):
    """eps = a convolution of x whose channels have means of their own; ``wrong`` makes the output another one."""

    def __init__(self, wrong: Callable[[Tensor, Tensor], Tensor] = lambda eps, t: eps) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)
        self.layer.weight.data = normal(3, 3, 1, 1, label="weight")
        self.layer.bias.data = torch.tensor([0.4, -2.0, 1.0])  # type: ignore[union-attr]
        self.layer.register_forward_hook(lambda module, arguments, output: wrong(output, self.t))
        self.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.t = t
        out: Tensor = self.layer(x)
        return out


def inject(eps: Tensor, t: Tensor) -> Tensor:
    k = t * len(SLOPE) // TOTAL
    return (1 + SLOPE[k, None, None, None]) * eps + BIAS[k][:, :, None, None]


@pytest.fixture(scope="module")
def inputs() -> CalibrationInputs:
    t = torch.tensor([999, 700, 600, 500, 300, 249, 5, 0]).repeat_interleave(6)
    return CalibrationInputs(normal(len(t), 3, 6, 6, label="x"), t)


def test_an_injected_correlated_error_is_found_and_undone_exactly(inputs: CalibrationInputs) -> None:
    """Its slope and its bias by channel, interval by interval. Rejects a line without intercept and a bias that is mean(d)."""
    exact, wrong = Scaled(), Scaled(inject)
    found = measure_correction(exact, wrong, inputs, 4, TOTAL)
    torch.testing.assert_close(found.slope, SLOPE, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.bias, BIAS, atol=1e-5, rtol=0)
    assert float(found.variance.max()) < 1e-10
    add_noise_correction(wrong, found, TOTAL)
    torch.testing.assert_close(wrong(inputs.x_t, inputs.t), exact(inputs.x_t, inputs.t), atol=2e-5, rtol=0)
    # What the published code fits would not: one line through the origin, and the mean of d.
    eps, k = exact(inputs.x_t, inputs.t), inputs.t * 4 // TOTAL
    d = inject(eps, inputs.t) - eps
    assert abs(float((d * eps)[k == 0].sum() / (eps * eps)[k == 0].sum()) - float(SLOPE[0])) > 0.01


def test_the_statistics_equal_numpys(inputs: CalibrationInputs) -> None:
    """Least squares by a design matrix of eps and one column a channel; the variance is what that leaves."""
    eps = Scaled()(inputs.x_t, inputs.t)
    noise = 0.3 * normal(*eps.shape, label="error")
    made = measure_correction(Scaled(), Given((1.2 * eps + noise).split(CHUNK)), inputs, 2, TOTAL)
    for k in (0, 1):
        rows = inputs.t * 2 // TOTAL == k
        e, d = (x[rows].movedim(1, 0).reshape(3, -1).double().numpy() for x in (eps, 0.2 * eps + noise))
        design = np.column_stack([e.ravel(), np.repeat(np.eye(3), e.shape[1], axis=0)])
        solution, residual, *_ = np.linalg.lstsq(design, d.ravel(), rcond=None)
        assert float(made.slope[k]) == pytest.approx(solution[0], rel=1e-4)
        np.testing.assert_allclose(made.bias[k], solution[1:], atol=1e-5)
        assert float(made.variance[k]) == pytest.approx(residual[0] / d.size, rel=1e-4)


class Given(nn.Module):
    """Puts out what it was given, piece by piece."""

    def __init__(self, outputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.outputs = iter(outputs)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return next(self.outputs)


def test_a_slope_below_zero_is_none(inputs: CalibrationInputs) -> None:
    """Then the bias is the mean of d, and all that varies is the residual."""
    found = measure_correction(Scaled(), Scaled(lambda eps, t: 0.7 * eps), inputs, 1, TOTAL)
    eps = Scaled()(inputs.x_t, inputs.t)
    assert found.slope.tolist() == [0.0]
    torch.testing.assert_close(found.bias[0], -0.3 * eps.mean(dim=(0, 2, 3)), atol=1e-5, rtol=0)
    spread = (0.3 * (eps - eps.mean(dim=(0, 2, 3), keepdim=True))).square().mean()
    torch.testing.assert_close(found.variance[0], spread, atol=1e-6, rtol=1e-5)


def test_what_cannot_be_measured_is_refused(inputs: CalibrationInputs) -> None:
    with pytest.raises(ConfigError, match="3 of 10 intervals"):
        measure_correction(Scaled(), Scaled(), inputs, 10, TOTAL)
    with pytest.raises(NumericalError, match="the quantized network puts out NaN"):
        measure_correction(Scaled(), Scaled(lambda eps, t: eps / 0), inputs, 1, TOTAL)


# --- samplers --------------------------------------------------------------------------------------------------------

SCHEDULE = make_schedule("linear", TOTAL)


def published_std(t: int, t_next: int, eta: float, error: float) -> float:
    """The step noise of PTQD, written out with the DDIM coefficients of the paper."""
    abar, abar_next = float(SCHEDULE.alphas_cumprod[t]), float(SCHEDULE.alphas_cumprod[t_next])
    variance = eta**2 * (1 - abar_next) / (1 - abar) * (1 - abar / abar_next)
    c = (1 - abar_next - variance) ** 0.5 - (abar_next * (1 - abar) / abar) ** 0.5
    return float(max(variance - c**2 * error**2, 0) ** 0.5)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("error", [0.02, 0.1, 10.0])
def test_ddim_draws_the_step_noise_that_the_paper_says(eta: float, error: float) -> None:
    """For errors smaller and larger than what a step can absorb, which depend on t. Rejects c as a sum, and sigma' = sigma - c e.

    With eps = 0 and every draw 1, x only grows by a factor from step to step, and by the step noise's standard deviation.
    """
    steps, start = 10, torch.zeros(1, 1, 1, 1).double()
    timesteps = sampling_timesteps(TOTAL, steps)
    found = ddim(
        lambda x, t: torch.zeros_like(x),
        start,
        SCHEDULE,
        steps,
        lambda: torch.ones_like(start),
        eta,
        clip=False,
        error_std=lambda t: error * t / 999,
    )
    abar = [*(float(SCHEDULE.alphas_cumprod[t]) for t in timesteps), 1.0]
    expected, value = [], 0.0
    for i, t in enumerate(timesteps):
        value *= (abar[i + 1] / abar[i]) ** 0.5
        value += published_std(t, timesteps[i + 1], eta, error * t / 999) if i < steps - 1 else 0.0
        expected.append(value)
    assert [float(x) for _, x in found] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_ddpm_absorbs_as_ddim_with_eta_one() -> None:
    def run(kind: str) -> Tensor:
        generators = generator(0, "test step noise")
        shape = 1, 1, 4, 4
        options = {"clip": False, "error_std": lambda t: 0.05}
        start, noise = torch.ones(shape).double(), lambda: torch.randn(shape, generator=generators).double()
        predict = lambda x, t: 0.1 * x  # noqa: E731
        if kind == "ddim":
            *_, (_, x) = ddim(predict, start, SCHEDULE, 10, noise, 1.0, **options)  # type: ignore[arg-type]
        else:
            *_, (_, x) = ddpm(predict, start, SCHEDULE, 10, noise, **options)  # type: ignore[arg-type]
        return x

    torch.testing.assert_close(run("ddim"), run("ddpm"))


def test_error_and_remaining_noise_have_the_variance_asked_for() -> None:
    assert remaining_std(0.5, 0.3) == pytest.approx(0.4)
    assert remaining_std(0.5, 0.6) == 0.0
    assert remaining_std(0.1, 0.0) == 0.1


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibration(checkpoint: Checkpoint) -> CalibrationSet:
    return calibrate(checkpoint, None, None, CalibrateConfig(steps=10, timesteps=10, samples=4), 0, Context())


@pytest.fixture(scope="module")
def weights(checkpoint: Checkpoint) -> QuantizedCheckpoint:
    made = plan(checkpoint, None, None, PlanConfig("uniform", low="int3"), 0, Context())
    return quantize(checkpoint, made, None, QuantizeConfig(), 0, Context())


@pytest.fixture(scope="module")
def corrected(checkpoint: Checkpoint, weights: QuantizedCheckpoint, calibration: CalibrationSet) -> QuantizedCheckpoint:
    return correct_noise(checkpoint, weights, calibration, NoiseCorrectionConfig(5), 0, Context())


def test_a_corrected_model_predicts_better(
    checkpoint: Checkpoint, weights: QuantizedCheckpoint, corrected: QuantizedCheckpoint, calibration: CalibrationSet
) -> None:
    """On the set, and the error that is left is the one that samplers are told of."""
    with torch.inference_mode():
        exact, plain, better = (m.network()(calibration.x_t, calibration.t) for m in (checkpoint, weights, corrected))
    before, after = (float((out - exact).square().mean()) for out in (plain, better))
    assert after < before
    assert corrected.noise_correction is not None
    told = [corrected.noise_correction.error_std(int(t), TOTAL) ** 2 for t in calibration.t]
    assert float(np.mean(told)) == pytest.approx(after, rel=1e-3)
    with torch.inference_mode():
        assert torch.equal(corrected.packed_network()(calibration.x_t, calibration.t), better)
    assert error_std(weights)(5) == error_std(checkpoint)(5) == 0.0


def test_a_model_without_tables_samples_as_before(weights: QuantizedCheckpoint, corrected: QuantizedCheckpoint) -> None:
    nothing = NoiseCorrection(torch.zeros(1), torch.zeros(1, 1), torch.zeros(1))
    noise = replace(nothing, variance=torch.full((1,), 0.01))
    for config in (SampleConfig(steps=4, count=2), SampleConfig("ddpm", steps=4, count=2)):
        plain, same, less, other = (
            sample(replace(weights, noise_correction=c), config, 0, Context()).images
            for c in (None, nothing, noise, corrected.noise_correction)
        )
        assert torch.equal(plain, same)
        assert torch.equal(plain, less) == (config.sampler == "ddim")  # without step noise there is nothing to absorb
        assert not torch.equal(plain, other)


def test_the_error_of_a_velocity_shrinks_with_the_signal(corrected: QuantizedCheckpoint) -> None:
    """eps = sqrt(1 - abar) x_t + sqrt(abar) v."""
    of_noise, of_velocity = (
        error_std(replace(corrected, spec=replace(corrected.spec, prediction=p)))(499) for p in ("eps", "v")
    )
    scale = float(corrected.spec.noise_schedule().alphas_cumprod[499]) ** 0.5
    assert 0 < of_velocity == pytest.approx(scale * of_noise)


def test_phases_are_corrected_once(checkpoint: Checkpoint) -> None:
    """Rejects a hook on the network itself, which a phased one passes twice where a batch is mixed."""
    fmt, tensors = get_format("int8:8/3"), checkpoint.tensors.items()
    packed = {n: pack_tensor(t, fmt if t.ndim > 1 else get_format("float32"), PerTensor()) for n, t in tensors}
    model = QuantizedCheckpoint(checkpoint.spec, packed)
    tables = NoiseCorrection(torch.tensor([0.5, 0.25]), torch.tensor([[0.1], [0.2]]), torch.zeros(2))
    x, t = normal(2, 1, 8, 8), torch.tensor([10, 990])
    plain, both = model.network(), replace(model, noise_correction=tables).network()
    assert isinstance(both, PhasedNetwork)
    expected = (plain(x, t) - tables.bias[:, :, None, None]) / (1 + tables.slope[:, None, None, None])
    torch.testing.assert_close(both(x, t), expected)


def test_what_does_not_belong_together_is_refused(
    checkpoint: Checkpoint, weights: QuantizedCheckpoint, corrected: QuantizedCheckpoint, calibration: CalibrationSet
) -> None:
    def stage(model: QuantizedCheckpoint, given: CalibrationSet | None) -> None:
        correct_noise(checkpoint, model, given, NoiseCorrectionConfig(), 0, Context())

    with pytest.raises(LineageError, match="recorded for another model"):
        stage(weights, replace(calibration, model="0" * 64))
    with pytest.raises(LineageError, match="without a calibration set"):
        stage(weights, None)
    with pytest.raises(LineageError, match="corrected already"):
        stage(corrected, calibration)
    with pytest.raises(LineageError, match="corrected for activations as they are"):
        quantize_activations(checkpoint, corrected, calibration, ActivationConfig(), 0, Context())


def test_a_model_comes_back_from_its_file_whose_size_is_known(
    weights: QuantizedCheckpoint, corrected: QuantizedCheckpoint, tmp_path: Path
) -> None:
    save_quantized(corrected, tmp_path)
    path = tmp_path / "model.safetensors"
    assert corrected.noise_correction is not None
    layout = noise_correction_layout(corrected.noise_correction)
    assert sum(t.nbytes for t in corrected.noise_correction.tensors.values()) == 4 * 5 * 3
    assert path.stat().st_size == file_bytes(
        stored_tensors(corrected.described) | layout, quantized_metadata(corrected)
    )
    loaded = load_quantized(tmp_path)
    assert loaded.noise_correction is not None
    for name, tensor in corrected.noise_correction.tensors.items():
        assert torch.equal(loaded.noise_correction.tensors[name], tensor)
    assert quantized_metadata(corrected) == quantized_metadata(weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_correction.slope": torch.full((5,), -0.1)}, "slope of a noise correction is less than 0"),
        ({"noise_correction.variance": torch.full((5,), -0.1)}, "variance of a noise correction is less than 0"),
        ({"noise_correction.slope": torch.full((5,), float("nan"))}, "NaN or infinity"),
        ({"noise_correction.bias": torch.full((5, 1), float("inf"))}, "NaN or infinity"),
        ({"noise_correction.bias": torch.zeros(5, 2)}, r"bias of a noise correction is torch.float32 \(5, 2\)"),
        ({"noise_correction.slope": torch.zeros(4)}, "noise correction"),
        ({"noise_correction.slope": torch.zeros(1001)}, "1001 intervals"),
        ({"noise_correction.variance": torch.zeros(5).half()}, "float16"),
        ({"noise_correction.other": torch.zeros(5)}, "a noise correction of bias, other"),
    ],
)
def test_tables_that_do_not_fit_the_model_are_refused(
    corrected: QuantizedCheckpoint, changes: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    save_quantized(corrected, tmp_path)
    rewrite(tmp_path / "model.safetensors", changes)
    with pytest.raises(ArtifactCorrupt, match=message):
        load_quantized(tmp_path)


def test_missing_parts_are_refused(corrected: QuantizedCheckpoint, tmp_path: Path) -> None:
    save_quantized(corrected, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("noise_correction.bias")
    save_file(tensors, path, metadata=quantized_metadata(corrected))
    with pytest.raises(ArtifactCorrupt, match="a noise correction of slope, variance"):
        load_quantized(tmp_path)


def test_a_corrected_model_is_not_imported(
    checkpoint: Checkpoint, corrected: QuantizedCheckpoint, tmp_path: Path
) -> None:
    made = plan(checkpoint, None, None, PlanConfig("uniform", low="float16"), 0, Context())
    half = quantize(checkpoint, made, None, QuantizeConfig(), 0, Context())
    save_quantized(replace(half, noise_correction=corrected.noise_correction), tmp_path)
    with pytest.raises(ArtifactCorrupt, match="what it predicts is corrected"):
        open_model(str(tmp_path / "model.safetensors"))


def test_the_command_corrects_after_activations_and_every_byte_is_accounted_for(tmp_path: Path) -> None:
    store = tmp_path / "store"
    good(store, "train", "--preset", "tiny", "--dataset", "mnist5k", "--steps", "5", "--name", "one")
    planned = good(store, "plan", "--uniform", "int4", "--name", "int4")
    good(store, "calibrate", "one", "--steps", "4", "--timesteps", "4", "--samples", "2", "--name", "inputs")
    plain = good(store, "quantize", "int4")
    flags = ("--noise-correction", "--noise-intervals", "2")
    made: Any = good(store, "quantize", "int4", *flags, "--calibration", "inputs")
    assert made["inputs"]["model"] == plain["id"] or plain["id"] in str(made["inputs"]["model"])
    assert made["file_bytes"] == Path(made["file"]).stat().st_size
    assert made["file_bytes"] == planned["file_bytes"] + made["noise_correction_bytes"]
    assert (
        f"and {made['noise_correction_bytes']:,} of noise correction" in call(store, "quantize", "int4", *flags).stdout
    )
    both: Any = good(store, "quantize", "int4", *flags, "--activations", "int8", "--dynamic", "--calibration", "inputs")
    added = both["activation_bytes"] + both["noise_correction_bytes"]
    assert both["file_bytes"] == both["promised_bytes"] + added
    found: Any = good(store, "size", str(made["id"]))
    assert found["kinds"]["noise_correction"] == 4 * 2 * 3
    assert sum(found["kinds"].values()) == found["file_bytes"]
    assert good(store, "sample", str(made["id"]), "--count", "2", "--steps", "2", "--sampler", "ddpm")["count"] == 2
    config = tmp_path / "fqdiff.toml"
    config.write_text("[noise-correction]\nintervals = 2\n")
    assert good(store, "quantize", "int4", "--config", str(config), "--dry-run")["id"] == made["id"]
    for arguments, message in (
        (("--noise-intervals", "2"), "add --noise-correction"),
        (("--noise-correction", "--noise-intervals", "5"), "hold no calibration input"),
        (("--calibration", "inputs"), "add --activations int8"),
    ):
        refused = call(store, "quantize", "int4", *arguments)
        assert refused.exit_code == 2
        assert message in refused.stderr
