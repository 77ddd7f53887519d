"""A network and how it learns from patches."""

import math

import numpy as np
import torch
from monai.losses import DeepSupervisionLoss, DiceCELoss
from torch import Tensor, nn

from vmamba.tools.devices import autocast
from vmamba.tools.training.seeding import derive_seed, seed_all
from vmamba.tools.user_errors import UserError

from .config import Config
from .data import Patches

POWER = 0.9  # of the schedule


def loss_function(config: Config) -> nn.Module:
    """Soft Dice without the background and cross-entropy, 1:1.

    With deep supervision the sum over the resolutions by nnU-Net's weights: 1/2^i, 0 for the lowest, normalised.
    """
    loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
    steps = len(config.features) - 1
    weights = np.array([0.5**i for i in range(steps)])
    if steps > 1:
        weights[-1] = 0
    return DeepSupervisionLoss(loss, weights=(weights / weights.sum()).tolist())


class Engine:
    """Trains a network with SGD, Nesterov momentum and the polynomial schedule, as nnU-Net does.

    Args:
        config: Settings, with a precision.
        network: With an attribute `decoder.deep_supervision`; moved to the device.
        patches: To learn from.
        device: Of the training.
    """

    def __init__(self, config: Config, network: nn.Module, patches: Patches, device: torch.device) -> None:
        self.config, self.network, self.patches, self.device = config, network.to(device), patches, device
        self.forward = torch.compile(network) if config.compile else network
        self.loss = loss_function(config)
        rates = dict(momentum=config.momentum, nesterov=config.momentum > 0, weight_decay=config.weight_decay)
        self.optimizer = torch.optim.SGD(network.parameters(), config.lr, **rates)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == 'fp16')

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch."""
        return self.config.lr * (1 - epoch / self.config.epochs) ** POWER

    def train_epoch(self, epoch: int) -> float:
        """Trains for an epoch; returns the mean loss.

        Raises:
            UserError: If that is not a finite number.
        """
        for group in self.optimizer.param_groups:
            group['lr'] = self.rate(epoch)
        seed_all(derive_seed(self.config.seed, epoch))
        self.network.train()
        self.network.decoder.deep_supervision = self.config.deep_supervision
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in self.patches.epoch(epoch):
            total += self._update(*(batch[key].to(self.device, non_blocking=True) for key in ('image', 'label')))
        loss = total.item() / self.config.iterations
        if not math.isfinite(loss):
            others = {'fp16': ' or choose precision bf16 or fp32', 'bf16': ' or choose precision fp32', 'fp32': ''}
            raise UserError(
                f'the loss is not a finite number in epoch {epoch + 1}; lower lr ({self.config.lr:g})'
                f'{others[self.config.precision]}'
            )
        return loss

    def _update(self, images: Tensor, labels: Tensor) -> Tensor:
        """One update; returns its loss."""
        self.optimizer.zero_grad()
        with autocast(self.device, self.config.precision):
            outputs = self.forward(images)
        loss = self.loss(outputs, labels)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()
