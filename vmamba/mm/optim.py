"""mmengine optimizer wrapper constructor with layer-wise learning-rate decay."""

from typing import Any, Dict, List, Optional, Set, Tuple

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from .base import TimmBackbone

_OPTIONS = {
    'custom_keys',
    'bias_lr_mult',
    'bias_decay_mult',
    'norm_decay_mult',
    'dwconv_decay_mult',
    'dcn_offset_lr_mult',
    'flat_decay_mult',
    'bypass_duplicate',
}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayConstructor(DefaultOptimWrapperConstructor):
    """Layer-wise learning-rate decay, and exemptions from weight decay.

    1-D parameters (biases, norms) and those in the backbone's `no_weight_decay` (embeddings, A_log, D, dt bias) have no
    weight decay. The n-th backbone layer from the end has the learning rate lr * layer_decay_rate^n; the last block is
    n = 1. Output norms, neck and heads use lr. Parameters with equal options form one group.

    Args:
        optim_wrapper_cfg: The wrapper, with an `optimizer` that has lr and weight_decay.
        paramwise_cfg: `layer_decay_rate`, 1 by default, and the options of mmengine's default constructor, which are
            applied first.

    Raises:
        ValueError: If paramwise_cfg has an unknown option.
    """

    def __init__(self, optim_wrapper_cfg: Dict[str, Any], paramwise_cfg: Optional[Dict[str, Any]] = None) -> None:
        paramwise_cfg = {'flat_decay_mult': 0.0, **(paramwise_cfg or {})}
        self.rate = paramwise_cfg.pop('layer_decay_rate', 1.0)
        if set(paramwise_cfg) - _OPTIONS:
            raise ValueError(f'unknown options of paramwise_cfg: {", ".join(sorted(set(paramwise_cfg) - _OPTIONS))}')
        super().__init__(optim_wrapper_cfg, paramwise_cfg)

    def add_params(self, params: List[dict], module: nn.Module, prefix: str = '', **kwargs: Any) -> None:
        """Appends parameter groups of a module's trainable parameters; mmengine calls it for every module."""
        super().add_params(params, module, prefix, **kwargs)
        if prefix:
            return
        scales, exempt = self._of_backbones(module)
        names = {parameter: name for name, parameter in module.named_parameters()}
        for group in params:
            name = names[group['params'][0]]
            group.setdefault('lr', self.base_lr)
            group['lr'] *= scales.get(name, 1.0)
            if name in exempt:
                group['weight_decay'] = 0.0
        params[:] = _merge(params)

    def _of_backbones(self, model: nn.Module) -> Tuple[Dict[str, float], Set[str]]:
        """Learning-rate scale by parameter name, and names without weight decay."""
        scales: Dict[str, float] = {}
        exempt: Set[str] = set()
        for prefix, module in model.named_modules():
            if isinstance(module, TimmBackbone):
                prefix = f'{prefix}.' if prefix else ''
                numbers = module.layer_numbers()
                end = 1 + max(numbers.values())
                scales.update({prefix + name: self.rate ** (end - number) for name, number in numbers.items()})
                exempt.update(prefix + name for name in module.no_weight_decay())
        return scales, exempt


def _merge(groups: List[dict]) -> List[dict]:
    merged: Dict[Tuple, dict] = {}
    for group in groups:
        options = {key: value for key, value in group.items() if key != 'params'}
        merged.setdefault(tuple(sorted(options.items())), {'params': [], **options})['params'] += group['params']
    return list(merged.values())
