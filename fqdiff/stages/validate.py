"""Does a Fisher table foretell what quantization does? Each tensor quantized alone, and whole plans, against every score.

Shapes: K candidates, M tensors, T timesteps, N inputs, C channels, H W pixels, P plans.
"""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from fqdiff.configs import ValidateConfig
from fqdiff.context import Context
from fqdiff.errors import ConfigError, DataError, LineageError, NumericalError
from fqdiff.models.registry import output_axes, parameter_blocks
from fqdiff.rng import generator
from fqdiff.sensitivity import rivals
from fqdiff.sensitivity.candidates import channel_errors, group_by_tensor, make_candidates, mean_bits, quantized_weight
from fqdiff.sensitivity.gram import gram, gram_rise
from fqdiff.sensitivity.inputs import Inputs, draw_inputs, graded_timesteps
from fqdiff.sensitivity.ledger import Ledger
from fqdiff.sensitivity.measure import final_images, outputs, replaced, residual, rises
from fqdiff.sensitivity.plans import make_plans
from fqdiff.sensitivity.predictions import at_timesteps, check_table, diagonal_rise, sampler_weights, trajectory_rise
from fqdiff.sensitivity.summary import IMAGE, OUTPUT, Judge, correlate, correlate_plans, error_shapes
from fqdiff.values import Checkpoint, Dataset, FisherTable, TriedPlans, Validation

# What the Hessian may cost: each product takes ten forward passes or more. HAWQ allows 100 draws, but ranks hardly move
# after the first (rho 0.991, 0.992, 0.982, 0.984 after 1, 2, 3 and 10 on the demo model).
HESSIAN_DRAWS = 4  # of each tensor at most
HESSIAN_SAMPLES = 1  # training images at each timestep


def validate(
    checkpoint: Checkpoint,
    dataset: Dataset,
    empirical: FisherTable | None,
    true: FisherTable | None,
    trajectory: FisherTable | None,
    config: ValidateConfig,
    seed: int,
    context: Context,
) -> Validation:
    """Measured rises on held-out images of ``dataset`` beside the predictions of the given tables and of the rival scores.

    Scores that look at images see training images only. Raises ConfigError without a table, LineageError for a table of
    another model or kind, DataError without held-out images.
    """
    tables = {k: t for k, t in (("empirical", empirical), ("true", true), ("trajectory", trajectory)) if t is not None}
    bench = Bench(checkpoint, dataset, tables, config, seed, context)
    with context.soft_stop() as stop_requested:
        ledger = Ledger(context, stop_requested)
        bench.measure_candidates(ledger)
        bench.fill_gram(ledger)
        bench.score_rivals(ledger)
        scores, by_timestep = bench.scores(ledger)
        plans = bench.try_plans(ledger, scores)
    error, shift = (ledger.rows(name, bench.count, len(bench.timesteps)) for name in ("output_error", "shift"))
    image_error, image_shift = (ledger.rows(name, bench.imaged) for name in ("image_error", "image_shift"))
    matrix = ledger.rows("gram", bench.count, bench.count)
    targets = {OUTPUT: error @ bench.weights, "timesteps": error}
    if config.images:
        targets[IMAGE] = image_error
    judge = Judge(seed, config.resamples, bench.pixels)
    rows, verdicts = correlate(bench.candidates, scores, by_timestep, targets, judge)
    shapes = error_shapes(bench.candidates, matrix, targets[OUTPUT], shift.square() @ bench.weights, bench.pixels)
    return Validation(
        candidates=bench.candidates,
        timesteps=bench.timesteps,
        weights=bench.weights,
        output_error=error,
        loss_rise=ledger.rows("loss_rise", *error.shape),
        shift=shift,
        image_error=image_error,
        image_shift=image_shift,
        predicted=by_timestep,
        scores=scores,
        gram=matrix,
        plans=plans,
        correlations=tuple(rows + correlate_plans(plans, judge)),
        verdicts=tuple(verdicts),
        errors=shapes,
    )


class Bench:
    """A model with its candidates, inputs and tables; each method fills the ledger with one kind of numbers."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dataset: Dataset,
        tables: Mapping[str, FisherTable],
        config: ValidateConfig,
        seed: int,
        context: Context,
    ) -> None:
        self.spec, self.config, self.seed, self.device = checkpoint.spec, config, seed, context.device
        self.tables = tables
        self.pixels = prod(self.spec.image_shape)
        if not len(dataset.reference):
            raise DataError(f"data set '{dataset.name}' holds no image back", "measure on images not trained on")
        if tuple(dataset.images.shape[1:]) != self.spec.image_shape:
            raise DataError(
                f"images of shape {tuple(dataset.images.shape[1:])} for a network of {self.spec.image_shape}",
                "take the data set that the model was trained on",
            )
        self.network = checkpoint.network().to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        axes, blocks = output_axes(self.network), parameter_blocks(self.network)
        self.candidates = make_candidates(checkpoint.tensors, blocks, config.formats, config.clipped)
        self.count = len(self.candidates)
        self.imaged = self.count if config.images else 0
        self.axes = axes
        self.weights_of = {name: checkpoint.tensors[name] for name in group_by_tensor(self.candidates)}
        self._check_tables()
        self.stored = [
            quantized_weight(c, self.weights_of[c.tensor], config.granularity, axes[c.tensor]) for c in self.candidates
        ]
        total = self.spec.noise_schedule().num_train_timesteps
        self.timesteps, self.weights = graded_timesteps(total, config.timesteps)
        self.inputs = self._draw(dataset.reference, "validate")
        self.calibration = self._draw(dataset.train, "validate calibration")
        self.reference = outputs(self.network, self.inputs, self.device)
        self.residual = residual(self.inputs, self.reference)
        self.images = self._images() if config.images else torch.zeros(0)

    def _check_tables(self) -> None:
        if not self.tables:
            raise ConfigError("no Fisher table to validate", "run fqdiff fisher first")
        for kind, table in self.tables.items():
            if table.kind != kind:
                raise LineageError(f"a Fisher table of kind '{table.kind}' as the {kind} one", "give it as what it is")
            check_table(table, self.candidates)

    def _draw(self, images: Tensor, label: str) -> Inputs:
        return draw_inputs(images, self.spec, self.timesteps, self.weights, self.config.samples, self.seed, label)

    def _images(self) -> Tensor:
        return final_images(self.network, self.spec, self.config.images, self.config.steps, self.seed, self.device)

    def _try(
        self, tensors: Mapping[str, Tensor], columns: Sequence[Tensor], images: Sequence[Tensor], row: int
    ) -> None:
        """Measure with ``tensors`` in place; ``columns`` get output error, loss rise and shift, ``images`` error and shift."""
        with replaced(self.network, tensors):
            delta = outputs(self.network, self.inputs, self.device) - self.reference
            for column, values in zip(columns, rises(delta, self.residual, self.config.samples), strict=True):
                column[row] = values
            if self.config.images:
                change = self._images() - self.images
                images[0][row], images[1][row] = change.square().mean(), change.mean()

    def measure_candidates(self, ledger: Ledger) -> None:
        """Rises and final images of every candidate on its own."""
        size = len(self.timesteps)
        columns = [ledger.rows(name, self.count, size) for name in ("output_error", "loss_rise", "shift")]
        images = [ledger.rows(name, self.imaged) for name in ("image_error", "image_shift")]
        for k in ledger.units("measure", self.count, "candidate"):
            self._try({self.candidates[k].tensor: self.stored[k]}, columns, images, k)

    def fill_gram(self, ledger: Ledger) -> None:
        """Inner products of all candidates' output errors, on training images."""
        matrix = ledger.rows("gram", self.count, self.count)
        chunks = self.calibration.chunks()
        for number in ledger.units("gram", len(chunks), "batch"):
            part = chunks[number]
            plain = outputs(self.network, part, self.device)
            deltas = torch.empty(self.count, *plain.shape)
            for k, candidate in enumerate(self.candidates):
                with replaced(self.network, {candidate.tensor: self.stored[k]}):
                    deltas[k] = outputs(self.network, part, self.device) - plain
            matrix += gram(deltas, part.share)

    def score_rivals(self, ledger: Ledger) -> None:
        """The scores that need gradients or second derivatives, on training images."""
        network = self.network.requires_grad_(True)
        groups = group_by_tensor(self.candidates)
        quantized = {name: [(k, self.stored[k]) for k in group] for name, group in groups.items()}
        modelopt = ledger.rows("modelopt", self.count)
        chunks = self.calibration.chunks()
        for number in ledger.units("modelopt", len(chunks), "batch"):
            modelopt += rivals.modelopt_scores(network, quantized, chunks[number], self.device, self.count)

        autoround = ledger.rows("autoround", self.count)
        for way_number in ledger.units("autoround", self.count // len(groups), "format"):
            option = {name: ways[way_number] for name, ways in quantized.items()}
            for k, score in rivals.autoround_scores(network, option, self.calibration, self.device).items():
                autoround[k] = score

        traces = ledger.rows("hutchinson", len(groups))
        few = torch.arange(len(self.calibration)) % self.config.samples < HESSIAN_SAMPLES
        inputs = self.calibration.chosen(few.nonzero().flatten())
        for number in ledger.units("hutchinson", len(groups), "tensor"):
            name = list(groups)[number]
            traces[number] = rivals.hessian_trace(network, name, inputs, self.device, self.seed, HESSIAN_DRAWS)
        network.requires_grad_(False)

    def scores(self, ledger: Ledger) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Every score of every candidate [K], and the Fisher tables' predictions by timestep [K, T]."""
        scores: dict[str, Tensor] = {}
        by_timestep: dict[str, Tensor] = {}
        squares = [
            channel_errors(self.weights_of[c.tensor], stored, self.axes[c.tensor])
            for c, stored in zip(self.candidates, self.stored, strict=True)
        ]
        steps, gains = sampler_weights(self.spec.noise_schedule(), self.config.steps)
        one = torch.ones(1, dtype=torch.int64)
        for kind, table in self.tables.items():
            if kind == "trajectory":
                rows = zip(self.candidates, squares, strict=True)
                values = [trajectory_rise(table.trajectory[c.tensor], s) for c, s in rows]
                scores[kind] = torch.tensor(values, dtype=torch.float64)
                continue
            curves = [diagonal_rise(table.entries[c.tensor], s) for c, s in zip(self.candidates, squares, strict=True)]

            def at(wanted: Tensor, curves: list[Tensor] = curves, table: FisherTable = table) -> Tensor:
                return torch.stack([at_timesteps(curve, table.timesteps, wanted) for curve in curves])

            by_timestep[kind] = at(self.timesteps)
            scores[f"{kind}_t1"] = at(one)[:, 0]
            scores[f"{kind}_mean"] = by_timestep[kind] @ self.weights
            scores[f"{kind}_sampler"] = at(steps) @ gains
        scores["gram"] = 0.5 * ledger.rows("gram", self.count, self.count).diagonal().clone()
        scores |= self._rival_scores(ledger, squares)
        for name, found in scores.items():
            if not torch.isfinite(found).all():
                raise NumericalError(f"the score '{name}' holds NaN or infinity", "check the checkpoint and its tables")
        return scores, by_timestep

    def _rival_scores(self, ledger: Ledger, squares: Sequence[Tensor]) -> dict[str, Tensor]:
        weights = [self.weights_of[c.tensor] for c in self.candidates]
        sizes = torch.tensor([c.numel for c in self.candidates], dtype=torch.float64)
        total = torch.stack([s.sum() for s in squares])
        groups = group_by_tensor(self.candidates)
        traces = ledger.rows("hutchinson", len(groups))
        trace = torch.cat([value.expand(len(group)) for value, group in zip(traces, groups.values(), strict=True)])
        magnitude = [rivals.mean_magnitude(weight) for weight in weights]
        return {
            "weight_mse": total / sizes,
            "magnitude": torch.tensor(magnitude, dtype=torch.float64),
            "hutchinson": trace / sizes * total,
            "modelopt": ledger.rows("modelopt", self.count),
            "autoround": ledger.rows("autoround", self.count),
            "random": torch.rand(self.count, dtype=torch.float64, generator=generator(self.seed, "random score")),
        }

    def try_plans(self, ledger: Ledger, scores: Mapping[str, Tensor]) -> TriedPlans:
        """Rises and final images of whole plans, beside sums of scores and the Gram matrix's prediction."""
        tensors = len(self.weights_of)
        labels: tuple[str, ...] = ()
        choice = torch.zeros(0, tensors, dtype=torch.int64)
        if self.config.plans:
            labels, choice = make_plans(self.candidates, self.config.plans, self.seed)
        count, imaged = len(labels), len(labels) if self.config.images else 0
        columns = [ledger.rows(f"plan {n}", count, len(self.timesteps)) for n in ("output_error", "loss_rise", "shift")]
        images = [ledger.rows(f"plan {n}", imaged) for n in ("image_error", "image_shift")]
        for number in ledger.units("plans", count, "plan"):
            chosen = [int(k) for k in choice[number]]
            self._try({self.candidates[k].tensor: self.stored[k] for k in chosen}, columns, images, number)
        predicted = {name: values[choice].sum(dim=1) for name, values in scores.items()}
        predicted["gram"], predicted["gram_diagonal"] = gram_rise(ledger.rows("gram", self.count, self.count), choice)
        bits = [mean_bits([self.candidates[int(k)] for k in row]) for row in choice]
        return TriedPlans(
            labels=labels,
            choice=choice,
            bits=torch.tensor(bits, dtype=torch.float64),
            output_error=columns[0] @ self.weights,
            shift=columns[2] @ self.weights,
            image_error=images[0],
            image_shift=images[1],
            predicted=predicted,
        )
