"""Base class of the backbones: a timm model in an mmengine module, with weight loading and frozen stages."""

from numbers import Integral
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence, Set, Union

import timm
from mmengine.dist import barrier, get_local_rank
from mmengine.logging import print_log
from mmengine.model import BaseModule
from timm.models import group_parameters
from timm.models._hub import download_cached_file
from torch import Tensor, nn

from ..models._pretrained import check_fit

_ADVICE = 'Check that the variant and its options match the checkpoint'

_OWN_OPTIONS = ('num_classes', 'drop_path_rate', 'features_only', 'out_indices', 'pretrained', 'pretrained_cfg_overlay')


class TimmBackbone(BaseModule):
    """A registered timm model as a backbone, `model`, without the layers that no output needs.

    State dicts in this library's and the official layouts load, also as part of a detector or segmentor. Missing,
    unexpected or differently shaped weights of the model raise RuntimeError.

    Args:
        variant: Name registered with timm.
        out_indices: Stages or blocks whose outputs are returned, ascending.
        drop_path_rate: Stochastic depth rate of the last block; rates grow linearly from 0.
        frozen_stages: Freeze the stem and this many first stages or blocks; -1 freezes nothing.
        with_cp: Recompute each block's activations in the backward pass.
        pretrained: Checkpoint of a classifier, detector or segmentor that `init_weights` loads, without output norms: a
            file, a URL, or True for the variant's published weights.
        init_cfg: The same as dict(type='Pretrained', checkpoint=...).
        model_options: Other arguments of the timm model, except those that the backbone sets.
    """

    family: type

    @staticmethod
    def rename_earlier(key: str) -> str:
        """Current name of a model parameter that an earlier version of this library called `key`."""
        return key

    def __init__(
        self,
        variant: str,
        out_indices: Sequence[int],
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        with_cp: bool = False,
        pretrained: Union[bool, str, None] = None,
        init_cfg: Optional[Dict[str, Any]] = None,
        model_options: Optional[Dict[str, Any]] = None,
    ) -> None:
        super().__init__()
        self.pretrained = _checkpoint(pretrained, init_cfg)
        self.variant, self.model_options = variant, _check_options(model_options or {})
        self.model = self._create(drop_path_rate=drop_path_rate)
        names = set(self.model.state_dict())
        self.out_indices = _check_indices(out_indices, self._depth(), variant)
        self.model.prune_intermediate_layers(list(self.out_indices), prune_norm=True)
        self._removed = names - set(self.model.state_dict())
        self.model.set_grad_checkpointing(with_cp)
        if not -1 <= frozen_stages <= self._depth():
            raise ValueError(f'frozen_stages must be in -1..{self._depth()}, got {frozen_stages}')
        self.frozen_stages = frozen_stages
        self._freeze()

    def _create(self, **kwargs: Any) -> nn.Module:
        known = timm.list_models(module=_modules_of(self.family))
        if not timm.is_model(self.variant):
            raise ValueError(f'unknown variant {self.variant!r}: {type(self).__name__} takes {", ".join(known)}')
        model = timm.create_model(self.variant, num_classes=0, **self.model_options, **kwargs)
        if not isinstance(model, self.family):
            raise ValueError(
                f'{self.variant} is not a {self.family.__name__} model: {type(self).__name__} takes {", ".join(known)}'
            )
        return model

    def _depth(self) -> int:
        """Number of stages or blocks that the model has left."""
        return len(self._layers())

    def _layers(self) -> Sequence[nn.Module]:
        raise NotImplementedError

    def _stem(self) -> Sequence[Union[nn.Module, nn.Parameter]]:
        raise NotImplementedError

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        for part in (*self._stem(), *self._layers()[: self.frozen_stages]):
            part.requires_grad_(False)
            if isinstance(part, nn.Module):
                part.eval()

    def train(self, mode: bool = True) -> 'TimmBackbone':
        """Sets the training mode; frozen layers stay in eval mode."""
        super().train(mode)
        self._freeze()
        return self

    def init_weights(self) -> None:
        """Loads the pretrained checkpoint, if any; otherwise the model keeps its initialisation.

        Raises:
            RuntimeError: If the checkpoint cannot be downloaded or read, or does not fit; the message names the keys.
        """
        if self.pretrained:
            overlay = None if self.pretrained is True else {'file': _fetch(self.pretrained)}
            source = self._create(pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
            self.model.load_state_dict({key: source[key] for key in self.model.state_dict()})
            print_log(f'{self.variant}: loaded {self.pretrained}', logger='current')
        self._is_init = True

    def no_weight_decay(self) -> Set[str]:
        """Names of the parameters without weight decay: embeddings, A_log, D, and all 1-D parameters."""
        flat = {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}
        return flat | {f'model.{name}' for name in self.model.no_weight_decay()}

    def layer_numbers(self) -> Dict[str, int]:
        """Layer number of each model parameter by name, 0 for the stem, for layer-wise learning-rate decay."""
        numbers = group_parameters(self.model, self.model.group_matcher(), reverse=True)
        return {f'model.{name}': number for name, number in numbers.items()}

    def _load_from_state_dict(self, state_dict: Dict[str, Tensor], prefix: str, *args: Any) -> None:
        self._fit_checkpoint(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _fit_checkpoint(self, state_dict: Dict[str, Tensor], prefix: str) -> None:
        """Renames the weights under the prefix to this module's names and checks that they are complete."""
        given = {key[len(prefix) :]: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        own = any(key.startswith('model.') for key in given)
        fitted = {self._rename(key): value for key, value in given.items()} if own else self._convert(given)
        removed = {f'model.{key}' for key in self._removed}
        fitted = {key: value for key, value in fitted.items() if key not in removed}
        fresh = [key for key in {*fitted, *self.state_dict()} if key.startswith('outnorm')]
        source = f'the checkpoint (its keys {prefix}*)'
        check_fit(fitted, self, source, [*fresh, *self._fresh(own)], _ADVICE)
        state_dict.update({prefix + key: value for key, value in fitted.items()})

    def _rename(self, key: str) -> str:
        return f'model.{self.rename_earlier(key[6:])}' if key.startswith('model.') else key

    def _convert(self, given: Dict[str, Tensor]) -> Dict[str, Tensor]:
        norms = {key: value for key, value in given.items() if key.startswith('outnorm')}
        weights = {key: value for key, value in given.items() if key not in norms}
        weights = self.model.filter_checkpoint(weights) if weights else {}
        return {**{f'model.{key}': v for key, v in weights.items() if not key.startswith('head.')}, **norms}

    def _fresh(self, own: bool) -> Iterable[str]:
        """Names of parameters that a checkpoint may lack; own: it is in this library's layout."""
        return ()


def _modules_of(family: type) -> List[str]:
    """timm's names of the modules that define a family, or the families that derive from a base class."""
    families: List[type] = family.__subclasses__() or [family]
    return [member.__module__.rpartition('.')[2] for member in families]


def _checkpoint(pretrained: Union[bool, str, None], init_cfg: Optional[Dict[str, Any]]) -> Union[bool, str]:
    if init_cfg is None:
        return pretrained or False
    if pretrained:
        raise ValueError(f'give pretrained ({pretrained}) or init_cfg ({init_cfg}), not both')
    if not isinstance(init_cfg, dict) or set(init_cfg) != {'type', 'checkpoint'} or init_cfg['type'] != 'Pretrained':
        raise ValueError(f"init_cfg must be dict(type='Pretrained', checkpoint=...), got {init_cfg}")
    return init_cfg['checkpoint']


def _check_options(model_options: Dict[str, Any]) -> Dict[str, Any]:
    taken = {key: value for key, value in model_options.items() if key in _OWN_OPTIONS}
    if taken:
        raise ValueError(f'model_options must not hold {", ".join(_OWN_OPTIONS)}: the backbone sets them; got {taken}')
    return dict(model_options)


def _check_indices(out_indices: Sequence[int], depth: int, variant: str) -> List[int]:
    indices = list(out_indices) if isinstance(out_indices, Iterable) else []
    integers = indices and all(isinstance(i, Integral) for i in indices)
    if not integers or indices != sorted(set(indices)) or indices[0] < 0 or indices[-1] >= depth:
        raise ValueError(
            f'out_indices must be a sequence of integers, ascending and within 0..{depth - 1} for {variant}, '
            f'got {out_indices!r}'
        )
    return indices


def _fetch(source: Union[str, Path]) -> str:
    """Local path of a file or URL; one process per machine downloads, the others wait."""
    if not str(source).startswith(('http://', 'https://')):
        return str(source)
    try:
        if get_local_rank() == 0:
            download_cached_file(str(source), check_hash=False)
        barrier()
        return download_cached_file(str(source), check_hash=False)
    except OSError as error:
        raise RuntimeError(f'could not download {source} ({error}): with a local copy, pass its path') from error
