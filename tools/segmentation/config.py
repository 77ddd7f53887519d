"""The settings of a training of U-Mamba."""

import dataclasses
from typing import Any, List, Optional

from vmamba.models.umamba import KINDS, MIXERS
from vmamba.tools.training.config import (
    ABOVE_0,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    SEED,
    SHARE,
    check_values,
    setting,
)
from vmamba.tools.user_errors import UserError


@dataclasses.dataclass
class Config:
    """Every key of a configuration; each is also an option of the command line."""

    task: str = setting('segmentation', 'this kind of training', ('segmentation',))
    # Network, see vmamba.models.UMamba
    kind: str = setting('bot', 'Mamba at the deepest stage (bot) or in the encoder (enc)', KINDS)
    mixer: str = setting('mamba', 'mamba, mamba2, or none for the same network without', MIXERS)
    in_chans: int = setting(1, 'channels of the images', POSITIVE)
    num_classes: int = setting(2, 'labels, the background included', POSITIVE)
    patch_size: List[int] = setting([], 'size of the patches, two or three numbers in the order of the files')
    features: List[int] = setting([32, 64, 128, 256, 512], 'channels of each stage')
    kernel_sizes: List[Any] = setting([], 'of each stage; default: 3')
    strides: List[Any] = setting([], 'of each stage; default: 1 for the first, then 2')
    encoder_blocks: int = setting(2, 'of each stage of the first half', POSITIVE)
    decoder_blocks: int = setting(2, 'of each stage of the first half', POSITIVE)
    deep_supervision: bool = setting(True, 'also learn from the decoder at lower resolutions')
    checkpoint: Optional[str] = setting(None, 'start from the weights in this file, also one of nnU-Net')
    # Data
    data: str = setting('', 'folder with images/ and labels/: files of the same names, PNG, TIFF, JPEG or NIfTI')
    val_data: Optional[str] = setting(None, 'folder of the same layout to validate on')
    val_fraction: float = setting(0.2, 'share of the data to validate on, without val_data', FRACTION)
    spacing: List[float] = setting([], 'resample volumes to voxels of this size, in mm; default: as they are', ABOVE_0)
    window: List[float] = setting([], 'clip intensities to this range, such as [-160, 240] for CT; [] not to')
    batch_size: int = setting(2, 'patches per update', POSITIVE)
    foreground: float = setting(0.33, 'share of the patches around a labelled pixel', SHARE)
    augment: bool = setting(True, 'flips, and noise, brightness and contrast')
    cache: float = setting(1.0, 'share of the images to keep in memory', PROBABILITY)
    workers: int = setting(2, 'loading processes', NOT_NEGATIVE)
    # Optimisation: SGD with Nesterov momentum, and the polynomial schedule of nnU-Net
    lr: float = setting(0.01, 'learning rate at the start', ABOVE_0)
    momentum: float = setting(0.99, 'of the optimizer', SHARE)
    weight_decay: float = setting(3e-5, 'of all parameters', NOT_NEGATIVE)
    clip_grad: float = setting(12.0, 'limit of the norm of the gradient', ABOVE_0)
    epochs: int = setting(1000, 'after each of which the network is saved', POSITIVE)
    iterations: int = setting(250, 'updates per epoch', POSITIVE)
    # How it runs
    precision: Optional[str] = setting(
        None, 'fp32, bf16 or fp16 (with loss scaling); default: bf16 on a GPU, fp32 on a CPU', ('fp32', 'bf16', 'fp16')
    )
    compile: bool = setting(False, 'compile the network')
    device: str = setting('', 'cpu or cuda, default: the GPU if there is one')
    seed: int = setting(0, 'of the weights, the split, the patches and the augmentation', SEED)
    # Records
    output: str = setting('', 'folder of the run, default: runs/NAME_OF_CONFIG')
    log: List[str] = setting(['tensorboard'], 'tensorboard, wandb; [] for neither', ('tensorboard', 'wandb'))
    val_every: int = setting(10, 'epochs between validations', POSITIVE)
    overlap: float = setting(0.5, 'of neighbouring patches in validation', SHARE)
    surface_tolerance: float = setting(1.0, 'of the surface Dice, in mm or pixels', ABOVE_0)
    draw: int = setting(8, 'predictions to draw at the end', NOT_NEGATIVE)

    def settle(self) -> None:
        """Fills in kernels and strides, and checks the values.

        Raises:
            UserError: If a value is wrong.
        """
        check_values(self)
        for key in ('data', 'patch_size'):
            if not getattr(self, key):
                raise UserError(f'the configuration gives no {key}')
        if len(self.patch_size) not in (2, 3):
            raise UserError(f'patch_size must have 2 or 3 numbers, got {self.patch_size}')
        if self.window and (len(self.window) != 2 or self.window[0] >= self.window[1]):
            raise UserError(f'window must be two numbers, the lower first, got {self.window}')
        if self.spacing and len(self.spacing) != len(self.patch_size):
            raise UserError(f'spacing must have {len(self.patch_size)} numbers, like patch_size, got {self.spacing}')
        self.kernel_sizes = self.kernel_sizes or [3] * len(self.features)
        self.strides = self.strides or [1] + [2] * (len(self.features) - 1)
