"""What passes between stages: frozen dataclasses that hold tensors and plain data, and never a path.

Shapes: N images, C channels, H W pixels, T timesteps, O output channels.
"""

from fqdiff.values.evidence import (
    Candidate,
    ClassifierWeights,
    Comparison,
    Correlation,
    Curve,
    ErrorShape,
    FidResult,
    Point,
    SampleSet,
    TriedPlans,
    Validation,
    Verdict,
)
from fqdiff.values.fisher import FisherEntry, FisherTable, SamplerGain, TrajectoryEntry, WeightBin
from fqdiff.values.models import (
    CalibrationSet,
    Checkpoint,
    Dataset,
    Model,
    ModelSpec,
    QuantizedCheckpoint,
    error_std,
    model_description,
    predict_noise,
)
from fqdiff.values.plans import Alternative, Budget, Phases, Plan, PlanEntry, planned_bytes

__all__ = [
    "Alternative",
    "Budget",
    "CalibrationSet",
    "Candidate",
    "Checkpoint",
    "ClassifierWeights",
    "Comparison",
    "Correlation",
    "Curve",
    "Dataset",
    "ErrorShape",
    "FidResult",
    "FisherEntry",
    "FisherTable",
    "Model",
    "ModelSpec",
    "Phases",
    "Plan",
    "PlanEntry",
    "Point",
    "QuantizedCheckpoint",
    "SampleSet",
    "SamplerGain",
    "TrajectoryEntry",
    "TriedPlans",
    "Validation",
    "Verdict",
    "WeightBin",
    "error_std",
    "model_description",
    "planned_bytes",
    "predict_noise",
]
