"""Weight decay and learning rates by layer, as mmengine's constructor of the optimizer wrapper."""

from typing import Any, Dict, List, Optional, Tuple

from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from torch import nn

from .base import TimmBackbone


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayConstructor:
    """No weight decay where it does harm, and learning rates that fall towards the backbone's first layer.

    Parameters of one dimension (biases, norms) and those that the backbone's `no_weight_decay` names (embeddings,
    A_log, D, the step's bias) take no weight decay. A layer n layers before the backbone's end learns at lr * rate^n,
    the last of its blocks being n = 1; its output norms, the neck and the heads learn at lr.

    Args:
        optim_wrapper_cfg: The wrapper, with an `optimizer` that has lr and weight_decay.
        paramwise_cfg: dict(layer_decay_rate=...), 1 by default.
    """

    def __init__(self, optim_wrapper_cfg: Dict[str, Any], paramwise_cfg: Optional[Dict[str, Any]] = None) -> None:
        paramwise_cfg = dict(paramwise_cfg or {})
        self.rate = paramwise_cfg.pop('layer_decay_rate', 1.0)
        if paramwise_cfg:
            raise ValueError(f'paramwise_cfg takes layer_decay_rate, got also {", ".join(paramwise_cfg)}')
        self.wrapper_cfg = dict(optim_wrapper_cfg)
        self.optimizer_cfg = dict(self.wrapper_cfg.pop('optimizer'))

    def __call__(self, model: nn.Module) -> OptimWrapper:
        model = getattr(model, 'module', model)  # of DistributedDataParallel
        groups = self.param_groups(model)
        optimizer = OPTIMIZERS.build({**self.optimizer_cfg, 'params': groups})
        return OPTIM_WRAPPERS.build({'type': 'OptimWrapper', **self.wrapper_cfg, 'optimizer': optimizer})

    def param_groups(self, model: nn.Module) -> List[Dict[str, Any]]:
        """The trained parameters in groups of one weight decay and one learning rate."""
        lr, decay = self.optimizer_cfg['lr'], self.optimizer_cfg.get('weight_decay', 0.0)
        scales, exempt = self._of_backbones(model)
        groups: Dict[Tuple[float, bool], Dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            scale = scales.get(name, 1.0)
            decays = parameter.ndim > 1 and name not in exempt
            new = dict(params=[], lr=lr * scale, weight_decay=decay if decays else 0.0)
            groups.setdefault((scale, decays), new)['params'].append(parameter)
        return list(groups.values())

    def _of_backbones(self, model: nn.Module) -> Tuple[Dict[str, float], set]:
        """Learning-rate scale by name, and the names without weight decay."""
        scales, exempt = {}, set()
        for prefix, module in model.named_modules():
            if isinstance(module, TimmBackbone):
                prefix = f'{prefix}.' if prefix else ''
                numbers = module.layer_numbers()
                end = 1 + max(numbers.values())
                scales.update({prefix + name: self.rate ** (end - number) for name, number in numbers.items()})
                exempt.update(prefix + name for name in module.no_weight_decay())
        return scales, exempt
