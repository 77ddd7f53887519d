"""Predictions of whole images by sliding windows, and their Dice scores."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from monai.data import DataLoader
from monai.inferers import sliding_window_inference
from monai.metrics import DiceMetric, SurfaceDiceMetric
from monai.networks.utils import one_hot
from torch import Tensor, nn

from .config import Config
from .draw import draw_case


@dataclass
class Evaluator:
    """Evaluates a network on whole cases.

    Attributes:
        config: Settings.
        device: Of the network.
        cases: Of `whole_cases`.
    """

    config: Config
    device: torch.device
    cases: DataLoader

    @torch.inference_mode()
    def predict(self, network: nn.Module, image: Tensor) -> Tensor:
        """Labels [1, 1, ...] of an image [1, C, ...]."""
        config = self.config
        options = dict(overlap=config.overlap, mode='gaussian' if config.overlap else 'constant')
        logits = sliding_window_inference(image, config.patch_size, config.batch_size, network, **options)
        return logits.float().argmax(dim=1, keepdim=True)

    def evaluate(
        self, network: nn.Module, surface: bool = False, folder: Optional[Path] = None
    ) -> List[Dict[str, Any]]:
        """Scores of each case and class; a class that is neither in the mask nor predicted has none.

        Args:
            network: In evaluation mode, without deep supervision.
            surface: Whether to compute the surface Dice too, which takes longer.
            folder: Where to draw the first predictions.
        """
        config, rows = self.config, []
        dice = DiceMetric(include_background=False, reduction='none')
        tolerances = [config.surface_tolerance] * (config.num_classes - 1)
        surface_dice = SurfaceDiceMetric(tolerances, reduction='none')
        for i, case in enumerate(self.cases):
            image, label = (case[key].as_tensor().to(self.device) for key in ('image', 'label'))
            predicted = self.predict(network, image)
            pair = [one_hot(labels, config.num_classes) for labels in (predicted, label)]
            scores = dict(dice=dice(*pair)[0])
            if surface:
                spacing = case['label'].pixdim[0].tolist()
                scores['surface_dice'] = surface_dice(*pair, spacing=spacing[: image.ndim - 2])[0]
            for number in range(1, config.num_classes):
                values = {key: float(score[number - 1]) for key, score in scores.items()}
                rows.append(dict(case=case['name'][0], label=number, **values))
            if folder and i < config.draw:
                name, arrays = case['name'][0], (label[0, 0], predicted[0, 0])
                mean = float(scores['dice'].nanmean())
                arrays = [array.cpu().numpy() for array in (image[0], *arrays)]
                draw_case(*arrays, f'{name}: Dice {mean:.3f}', folder / f'{name}.png')
        return rows
