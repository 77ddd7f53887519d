"""A network: how it learns from patches, and how it predicts whole images by sliding windows."""

import math
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
import torch
from monai.data import DataLoader
from monai.inferers import sliding_window_inference
from monai.losses import DeepSupervisionLoss, DiceCELoss
from monai.metrics import DiceMetric, SurfaceDiceMetric
from monai.networks.utils import one_hot
from torch import Tensor, nn

from vmamba.tools.devices import autocast
from vmamba.tools.figures.plots import draw_case
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
    """Trains a network with SGD, Nesterov momentum and the polynomial schedule, as nnU-Net does."""

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

    @torch.inference_mode()
    def predict(self, image: Tensor) -> Tensor:
        """Labels [1, 1, ...] of an image [1, C, ...]; the network predicts without deep supervision from now on."""
        config, network = self.config, self.network.eval()
        network.decoder.deep_supervision = False
        options = dict(overlap=config.overlap, mode='gaussian' if config.overlap else 'constant')
        with autocast(self.device, config.precision):
            logits = sliding_window_inference(
                image.to(self.device), config.patch_size, config.batch_size, network, **options
            )
        return logits.float().argmax(dim=1, keepdim=True)

    def evaluate(self, cases: DataLoader, surface: bool = False, folder: Optional[Path] = None) -> List[Dict[str, Any]]:
        """Scores of each case and class; a class that is neither in the mask nor predicted has none."""
        config, rows = self.config, []
        metrics = {'dice': DiceMetric(include_background=False, reduction='none')}
        if surface:
            tolerances = [config.surface_tolerance] * (config.num_classes - 1)
            metrics['surface_dice'] = SurfaceDiceMetric(tolerances, reduction='none')
        for i, case in enumerate(cases):
            image, label = (case[key].as_tensor().to(self.device) for key in ('image', 'label'))
            name, predicted = case['name'][0], self.predict(image)
            pair = [one_hot(labels, config.num_classes) for labels in (predicted, label)]
            spacing = case['label'].pixdim[0].tolist()[: image.ndim - 2]
            options = {'surface_dice': dict(spacing=spacing)}
            scores = {key: metric(*pair, **options.get(key, {}))[0] for key, metric in metrics.items()}
            for number in range(1, config.num_classes):
                values = {key: float(score[number - 1]) for key, score in scores.items()}
                rows.append(dict(case=name, label=number, **values))
            if folder and i < config.draw:
                arrays = [array.cpu().numpy() for array in (image[0], label[0, 0], predicted[0, 0])]
                draw_case(*arrays, f'{name}: Dice {float(scores["dice"].nanmean()):.3f}', folder / f'{name}.png')
        return rows
