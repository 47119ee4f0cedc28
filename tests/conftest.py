"""A tiny model and data set that the tests share: seconds, not minutes."""

import os

# One thread: two wait for each other at every small operation, for milliseconds each when the machine is busy.
os.environ.update(OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS="1")

import pytest
import torch

from fqdiff.configs import FisherConfig, TrainConfig, get_preset
from fqdiff.context import Context
from fqdiff.models.registry import unet_architecture, unet_config
from fqdiff.rng import generator
from fqdiff.stages.fisher import fisher
from fqdiff.stages.train import train
from fqdiff.values import Checkpoint, Dataset, FisherTable


def tiny_config(**changes: object) -> TrainConfig:
    preset = get_preset("tiny")
    architecture = unet_architecture(unet_config(preset.architecture))
    return TrainConfig(**{**preset.train, "architecture": architecture, "steps": 6, **changes})


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    images = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8, generator=generator(0, "test images"))
    return Dataset("noise", images, torch.arange(60) % 3, torch.arange(60) >= 40)


@pytest.fixture(scope="session")
def checkpoint(dataset: Dataset) -> Checkpoint:
    return train(dataset, None, tiny_config(), 0, Context())


@pytest.fixture(scope="session")
def fisher_table(checkpoint: Checkpoint, dataset: Dataset) -> FisherTable:
    return fisher(checkpoint, dataset, FisherConfig(timesteps=1000, samples=2), 0, Context())
