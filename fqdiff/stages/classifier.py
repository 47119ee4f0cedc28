"""The digits feature network, trained on the labelled training images of a data set."""

import torch
import torch.nn.functional as F

from fqdiff.configs import ClassifierConfig
from fqdiff.context import Context
from fqdiff.errors import DataError
from fqdiff.evidence.digits import DigitClassifier, in_batches, moved
from fqdiff.evidence.features import to_unit_range
from fqdiff.rng import derive_seed, generator
from fqdiff.values import ClassifierWeights, Dataset


def classifier(dataset: Dataset, config: ClassifierConfig, seed: int, context: Context) -> ClassifierWeights:
    """Weights after ``config.epochs`` epochs of Adam with a rate falling to zero, with held-out accuracy.

    Raises DataError for a data set without labels. Always on one thread of the CPU, so that every machine measures with the
    same network; for one so small, two are slower.
    """
    if dataset.labels is None:
        raise DataError(f"data set '{dataset.name}' has no labels to train a classifier on", "use --features inception")
    images, labels = to_unit_range(dataset.train), dataset.labels[~dataset.held_out]
    _, channels, size, _ = images.shape
    classes = int(dataset.labels.max()) + 1
    with torch.random.fork_rng(devices=[]):  # torch's initialisers draw from the global generator
        torch.manual_seed(derive_seed(seed, "classifier"))
        network = DigitClassifier(channels, size, classes)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
        steps = config.epochs * -(-len(images) // config.batch_size)
        fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        with context.progress(steps, "classifier", "step") as bar:
            for epoch in range(config.epochs):
                draw = generator(seed, "classifier", epoch)
                order = torch.randperm(len(images), generator=draw)
                for chosen in order.split(config.batch_size):
                    optimizer.zero_grad()
                    batch = moved(images[chosen], config.shift, config.rotation, config.scaling, draw)
                    F.cross_entropy(network(batch), labels[chosen]).backward()
                    optimizer.step()
                    fall.step()
                    bar.update()
        probabilities = in_batches(network, to_unit_range(dataset.reference)).softmax(dim=1)
        accuracy = float((probabilities.argmax(dim=1) == dataset.labels[dataset.held_out]).double().mean())
        confidence = float(probabilities.amax(dim=1).double().mean())
    finally:
        torch.set_num_threads(threads)
    tensors = {name: p.detach() for name, p in network.named_parameters()}
    return ClassifierWeights(dataset.name, classes, (channels, size, size), tensors, accuracy, confidence)
