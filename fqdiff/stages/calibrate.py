"""A calibration set: model inputs recorded along the full-precision sampler, from which ranges of activations are taken."""

import torch
from torch import Tensor

from fqdiff.calibration.inputs import CHUNK, Kept, Sampler, joined, noised_images, record_runs
from fqdiff.calibration.schemes import chosen_steps
from fqdiff.configs import CalibrateConfig
from fqdiff.context import Context, Part
from fqdiff.diffusion.samplers import sampling_timesteps
from fqdiff.digests import tensor_digest
from fqdiff.errors import ConfigError, LineageError, NumericalError
from fqdiff.sensitivity.predictions import at_timesteps
from fqdiff.values import CalibrationSet, Checkpoint, Dataset, FisherTable


def calibrate(
    checkpoint: Checkpoint,
    fisher: FisherTable | None,
    dataset: Dataset | None,
    config: CalibrateConfig,
    seed: int,
    context: Context,
) -> CalibrationSet:
    """``config.samples`` x ``config.timesteps`` inputs, step by step. Inputs of run k depend on (seed, k) alone.

    ``fisher`` weighs the timesteps of the scheme ``fisher``; ``dataset`` has the images of the source ``data``. Finished
    pieces of 32 runs are kept, so that a killed run continues. Raises LineageError where the table is of another model or
    an input is missing, NumericalError where a run leaves the finite numbers.
    """
    spec = checkpoint.spec
    total = spec.noise_schedule().num_train_timesteps
    timesteps = torch.tensor(sampling_timesteps(total, config.steps))
    mass = fisher_mass(checkpoint, fisher, timesteps) if config.scheme == "fisher" else None
    steps = chosen_steps(config, seed, mass)
    sampler = Sampler(config.sampler, config.steps, config.eta)
    dtype = torch.float16 if config.precision == "float16" else torch.float32
    network = checkpoint.network().to(context.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = _images(dataset, spec.image_shape) if config.source == "data" else None
    pieces: list[Kept] = []
    with context.progress(config.samples, "calibrate", "run") as bar:
        for number, ks in enumerate(torch.arange(config.samples).split(CHUNK)):
            name = f"runs-{number:04}"
            saved = context.parts.load(name)
            if saved is None:
                if images is not None:
                    made = noised_images(spec, images, sampler, ks.tolist(), steps[ks], seed)
                else:
                    made = record_runs(spec, network, sampler, ks.tolist(), steps[ks], seed, context.device)
                saved = Part({"x_t": _stored(made.x_t, dtype), "t": made.t, "step": made.step}, {})
                context.parts.save(name, saved)
            pieces.append(Kept(**saved.tensors))
            bar.update(len(ks))
    inputs = joined(pieces)
    return CalibrationSet(inputs.x_t, inputs.t, tensor_digest(checkpoint.tensors), total)


def _stored(x_t: Tensor, dtype: torch.dtype) -> Tensor:
    """``x_t`` in ``dtype``. Raises NumericalError where that is not finite."""
    stored = x_t.to(dtype)
    if not torch.isfinite(stored).all():
        raise NumericalError(
            f"calibration inputs up to {float(x_t.abs().max()):.3g} in {dtype}", "check the checkpoint"
        )
    return stored


def _images(dataset: Dataset | None, shape: tuple[int, int, int]) -> Tensor:
    """The training images of ``dataset``. Raises LineageError where there are none, or of another shape."""
    if dataset is None:
        raise LineageError("noised training images without a data set", "fqdiff calibrate --source noise")
    if tuple(dataset.images.shape[1:]) != shape:
        raise LineageError(f"images of shape {tuple(dataset.images.shape[1:])} for a model of {shape}")
    return dataset.train


def fisher_mass(checkpoint: Checkpoint, fisher: FisherTable | None, timesteps: Tensor) -> Tensor:
    """Fisher information of all parameters together at ``timesteps`` [S], float64: log-linear between those of the table.

    Raises LineageError where the table is missing or of another model, ConfigError where it knows no timesteps.
    """
    if fisher is None:
        raise LineageError("timesteps in proportion to their Fisher mass, without a Fisher table", "fqdiff fisher")
    if not fisher.entries:
        raise ConfigError(f"the {fisher.kind} Fisher table has no values by timestep", "fqdiff fisher")
    sizes = {name: entry.numel for name, entry in fisher.entries.items()}
    if sizes != {name: tensor.numel() for name, tensor in checkpoint.tensors.items()}:
        raise LineageError("the Fisher table is of another model", "run fqdiff fisher on this checkpoint")
    mass = torch.stack([entry.numel * entry.mean.double() for entry in fisher.entries.values()]).sum(dim=0)
    return at_timesteps(mass, fisher.timesteps, timesteps)
