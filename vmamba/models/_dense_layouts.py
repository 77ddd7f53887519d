"""The checkpoints of detectors, segmentors and their backbones."""

from typing import Dict, Tuple

from torch import Tensor


def split_backbone(state_dict: Dict[str, Tensor]) -> Tuple[Dict[str, Tensor], Dict[str, Tensor]]:
    """The weights of the classification model in a checkpoint, and the norms of the backbone's outputs, `outnorm{i}`.

    A detector or segmentor has its backbone under `backbone.`; a backbone of this library has its model under `model.`,
    and beside it the norms and, of Vim, the pyramid. All else is left out. Others' weights pass unchanged.
    """
    if any(key.startswith('backbone.') for key in state_dict):
        state_dict = _below('backbone.', state_dict)
    norms = {key: value for key, value in state_dict.items() if key.startswith('outnorm')}
    weights = _below('model.', state_dict) or {key: v for key, v in state_dict.items() if key not in norms}
    return weights, norms


def _below(prefix: str, state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
