"""U-Mamba in nnU-Net v2: nnU-Net's trainer, plans and data with another network.

nnU-Net: a self-configuring method for deep learning-based biomedical image segmentation,
https://doi.org/10.1038/s41592-020-01008-z
"""

from typing import Any, Dict

import numpy as np
from torch import nn

from vmamba.models import UMamba

try:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
except ModuleNotFoundError as error:
    message = f"the trainers need nnU-Net ({error}): pip install 'vmamba[medical]'"
    raise ModuleNotFoundError(message, name=error.name) from error

# Arguments of UMamba and their keys in plans; those of residual encoders have another name for the first.
_KEYS = {
    'encoder_blocks': ('n_conv_per_stage', 'n_blocks_per_stage'),
    'decoder_blocks': ('n_conv_per_stage_decoder',),
    'features': ('features_per_stage',),
    'kernel_sizes': ('kernel_sizes',),
    'strides': ('strides',),
}
_ADVICE = 'U-Mamba needs the plans of a convolutional network, as nnUNetv2_plan_and_preprocess makes them'


def plan_arguments(configuration_manager: ConfigurationManager) -> Dict[str, Any]:
    """The arguments of `UMamba` that a configuration of nnU-Net's plans determines.

    Raises:
        ValueError: If the plans lack one.
    """
    try:
        found, patch_size = configuration_manager.network_arch_init_kwargs, configuration_manager.patch_size
    except KeyError as error:
        raise ValueError(f'the plans have no {error.args[0]}: {_ADVICE}') from error
    arguments = {name: next((found[key] for key in keys if key in found), None) for name, keys in _KEYS.items()}
    missing = [' or '.join(_KEYS[name]) for name, value in arguments.items() if value is None]
    if missing:
        raise ValueError(f'the plans have no {", ".join(missing)} for the network, only {", ".join(found)}: {_ADVICE}')
    return dict(arguments, patch_size=list(patch_size))


class UMambaTrainer(nnUNetTrainer):
    """nnU-Net's trainer with U-Mamba of a kind and mixer, see `vmamba.models.UMamba`."""

    kind: str
    mixer = 'mamba'

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The network of the plans, in training and in prediction."""
        return UMamba(
            cls.kind,
            in_chans=num_input_channels,
            num_classes=num_output_channels,
            deep_supervision=enable_deep_supervision,
            mixer=cls.mixer,
            **plan_arguments(configuration_manager),
        )

    def train_step(self, batch: Dict[str, Any]) -> Dict[str, Any]:
        """One update.

        Raises:
            RuntimeError: If the loss is not a finite number, from which training does not recover.
        """
        result = super().train_step(batch)
        if not np.isfinite(result['loss']).all():
            raise RuntimeError(
                f'the loss is {result["loss"]} in epoch {self.current_epoch}: continue from the last checkpoint with '
                f'--c, or lower the learning rate (initial_lr {self.initial_lr:g})'
            )
        return result


class nnUNetTrainerUMambaBot(UMambaTrainer):
    """U-Mamba with one Mamba layer, at the deepest stage."""

    kind = 'bot'


class nnUNetTrainerUMambaEnc(UMambaTrainer):
    """U-Mamba with Mamba layers in the encoder."""

    kind = 'enc'


class nnUNetTrainerUMamba2Bot(nnUNetTrainerUMambaBot):
    """U-Mamba with one layer of Mamba-2, at the deepest stage."""

    mixer = 'mamba2'


class nnUNetTrainerUMamba2Enc(nnUNetTrainerUMambaEnc):
    """U-Mamba with layers of Mamba-2 in the encoder."""

    mixer = 'mamba2'


class nnUNetTrainerUMambaNone(nnUNetTrainerUMambaBot):
    """The network of U-Mamba without Mamba, against which it has to be compared."""

    mixer = 'none'
