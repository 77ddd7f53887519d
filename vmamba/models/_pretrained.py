"""Building models with timm's builder, and loading their checkpoints without ever leaving a weight to chance."""

import argparse
import logging
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Optional, Sequence, Tuple, Type, Union

import safetensors
import safetensors.torch
import torch
from timm.models import adapt_input_conv, build_model_with_cfg, clean_state_dict
from torch import Tensor, nn

from ..layers.options import check_indices

_logger = logging.getLogger(__name__)

StateDict = Dict[str, Tensor]
FilterFn = Callable[[StateDict, nn.Module], StateDict]

_NAMES_SHOWN = 12


def build_model(
    model_cls: Type[nn.Module],
    variant: str,
    pretrained: bool,
    filter_fn: FilterFn,
    feature_cfg: Dict[str, Any],
    pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
    **kwargs,
) -> nn.Module:
    """Builds a registered variant with timm's builder; official files go through the model's `load_pretrained`.

    Args:
        model_cls: Model class with a `load_pretrained(path)` method.
        variant: Registered name.
        pretrained: Load weights.
        filter_fn: Renames any known checkpoint layout to the model's.
        feature_cfg: Defaults of timm's feature extraction.
        pretrained_cfg_overlay: timm's overlay of the pretrained configuration, e.g. dict(file=path).
        **kwargs: Arguments of the model class and of timm's builder; an unknown one is a TypeError.

    Raises:
        RuntimeError: If weights cannot be fetched or do not fit the model.
        ValueError: If out_indices is empty.
    """
    # timm's own reading of a file prefers EMA weights and is lax about missing keys once num_classes differs.
    check_indices(out_indices=kwargs.get('out_indices'))
    overlay = {'custom_load': 'hf', **(pretrained_cfg_overlay or {})}
    if kwargs.get('features_only'):
        kwargs.setdefault('num_classes', 0)

    def filter_and_check(state_dict: StateDict, model: nn.Module) -> StateDict:
        source = f'the checkpoint of {variant}'
        _check_tensors(state_dict, source)
        state_dict, fresh = _fit_classifier(filter_fn(state_dict, model), model, source)
        adapted_by_timm = {_input_key(model)} & state_dict.keys()
        check_fit(state_dict, model, source, fresh={*fresh, *adapted_by_timm})
        # timm discards every classifier but one of the pretrained configuration's number of classes.
        kept = {key: state_dict[key] for key in _classifier_keys(model) if key in state_dict}
        model.load_state_dict(kept, strict=False)
        return state_dict

    try:
        return build_model_with_cfg(
            model_cls,
            variant,
            pretrained,
            pretrained_filter_fn=filter_and_check,
            feature_cfg=feature_cfg,
            pretrained_cfg_overlay=overlay,
            **kwargs,
        )
    except OSError as error:
        if not pretrained or isinstance(error, CheckpointFileError):
            raise
        raise _download_error(variant, error) from error
    except Exception as error:
        if pretrained and type(error).__module__.split('.')[0] in ('huggingface_hub', 'httpx', 'requests'):
            raise _download_error(variant, error) from error
        raise


def _download_error(variant: str, error: Exception) -> RuntimeError:
    return RuntimeError(
        f'could not download the weights of {variant} ({error}); with a local copy, use '
        f"timm.create_model('{variant}', pretrained=True, pretrained_cfg_overlay=dict(file='path/to/checkpoint'))"
    )


class _Inert:
    """Stands for a pickled record that is not needed: takes whatever it is built from and keeps none of it."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# What official files hold beside their weights: Vim's the arguments of the training run, an argparse.Namespace;
# VMamba's the records of mmengine and yacs, with numbers of numpy. Of the latter nothing is imported or run.
_RECORDS = {
    'yacs.config.CfgNode': OrderedDict,
    'mmengine.logging.history_buffer.HistoryBuffer': _Inert,
    'builtins.getattr': _Inert,  # names the buffer's statistics; the real one would hand out any function
    'numpy.dtype': _Inert,
    'numpy.ndarray': _Inert,
    'numpy.core.multiarray._reconstruct': _Inert,
    'numpy._core.multiarray._reconstruct': _Inert,
    'numpy.core.multiarray.scalar': _Inert,
    'numpy._core.multiarray.scalar': _Inert,
}


class CheckpointFileError(FileNotFoundError):
    """The checkpoint file that was asked for does not exist."""


def read_checkpoint(path: Union[str, Path], use_ema: bool = False) -> StateDict:
    """Reads the weights of a .safetensors file or of a PyTorch file, which is never unpickled beyond weights.

    The checksums in a PyTorch file are verified, if it was written with them.

    A PyTorch file may hold the weights themselves or a dictionary of a training run: of that, the first present of
    `state_dict_ema`, `state_dict` (timm), `model`, `model_ema` (official) is taken.

    Args:
        path: File.
        use_ema: Prefer `model_ema` to all others.

    Raises:
        CheckpointFileError: If there is no such file.
        RuntimeError: If the file is corrupt or holds something other than weights.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointFileError(f'there is no checkpoint file {path}')
    try:
        if path.suffix == '.safetensors':
            return safetensors.torch.load_file(path)
        check_sums(path)
        with torch.serialization.safe_globals(
            [argparse.Namespace, *((record, name) for name, record in _RECORDS.items())]
        ):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        raise RuntimeError(_refusal(path)) from error
    except (RuntimeError, EOFError, ValueError, zipfile.BadZipFile, safetensors.SafetensorError) as error:
        raise RuntimeError(f'{path} is not a readable checkpoint: {error}') from error
    return _select_weights(checkpoint, path, use_ema)


def check_sums(path: Path) -> None:
    """Raises RuntimeError, naming the first damaged entry, if the file is an archive that fails its checksums."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        summed = any(entry.CRC for entry in archive.infolist())  # torch can leave them out: then all are 0
        damaged = archive.testzip() if summed else None
    if damaged is not None:
        raise RuntimeError(f'its entry {damaged} is damaged (wrong checksum): fetch the file again')


def _refusal(path: Path) -> str:
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError):
        found = []
    refused = [name for name in found if name not in ('argparse.Namespace', *_RECORDS)]
    if not refused:
        return f'{path} is not a readable checkpoint: it is corrupt or in another format'
    return (
        f'{path} holds more than weights: {", ".join(refused)}. Such objects could run code and are not loaded; if '
        f"you trust the file, keep only its weights: torch.save(torch.load(path, weights_only=False)['model'], "
        f"'weights.pth') (or ['state_dict'], where they are under that key)"
    )


def _select_weights(checkpoint: Any, path: Path, use_ema: bool) -> StateDict:
    keys = ('state_dict_ema', 'state_dict', 'model', 'model_ema')
    if isinstance(checkpoint, dict):
        for key in ('model_ema', *keys) if use_ema else keys:
            if isinstance(checkpoint.get(key), dict):
                checkpoint = checkpoint[key]
                break
    is_weights = isinstance(checkpoint, dict) and checkpoint and all(isinstance(v, Tensor) for v in checkpoint.values())
    if not is_weights:
        found = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise RuntimeError(f'{path} holds no weights: expected tensors, or them under one of {keys}, found {found}')
    _check_tensors(checkpoint, path)
    return clean_state_dict(checkpoint)


def _check_tensors(state_dict: Dict[Any, Tensor], source: Union[str, Path]) -> None:
    """Raises RuntimeError, with the key, unless all keys are strings and all tensors dense, with data."""
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise RuntimeError(
                f'{source} has the key {key!r}: the keys of weights must be strings, as in a state_dict()'
            )
        if value.is_meta or value.is_nested or value.layout != torch.strided:
            kind = 'meta' if value.is_meta else 'nested' if value.is_nested else str(value.layout).split('.')[-1]
            raise RuntimeError(
                f'{source} has a {kind} tensor as {key}: save the weights as dense tensors with their data'
            )


def load_pretrained(model: nn.Module, path: Union[str, Path], filter_fn: FilterFn, use_ema: bool = False) -> None:
    """Loads a checkpoint in any known layout into a model made by timm's builder; every weight must be in it.

    Another number of image channels adapts the input convolution as timm does. A classifier that the caller asked to
    have another number of classes than the pretrained configuration stays freshly initialised, which is logged.

    Args:
        model: Model with a `pretrained_cfg`.
        path: File of `read_checkpoint`.
        filter_fn: Renames any known checkpoint layout to the model's.
        use_ema: Prefer the official EMA weights.

    Raises:
        RuntimeError: If a key is missing, unexpected or of another shape, with the names.
    """
    state_dict = filter_fn(read_checkpoint(path, use_ema), model)
    input_key = _input_key(model)
    weight = state_dict.get(input_key)
    if weight is not None and weight.ndim == 4 and weight.shape[1] == 3 and model.in_chans != 3:
        state_dict[input_key] = adapt_input_conv(model.in_chans, weight)

    state_dict, fresh = _fit_classifier(state_dict, model, path)
    check_fit(state_dict, model, path, fresh)
    model.load_state_dict(state_dict, strict=not fresh)


def _fit_classifier(
    state_dict: StateDict, model: nn.Module, source: Union[str, Path]
) -> Tuple[StateDict, Sequence[str]]:
    """The weights without a classifier that the model has not or is to start anew, and the names of the latter."""
    own, classifier = model.state_dict(), _classifier_keys(model)
    rest = {key: value for key, value in state_dict.items() if key not in classifier}
    if not any(key in own for key in classifier):
        return rest, ()
    fits = all(key in state_dict and state_dict[key].shape == own[key].shape for key in classifier)
    if fits or model.num_classes == model.pretrained_cfg['num_classes']:
        return state_dict, ()
    _logger.warning('%s has no classifier of %d classes: it starts freshly initialised', source, model.num_classes)
    return rest, classifier


def _classifier_keys(model: nn.Module) -> list[str]:
    return [f'{model.pretrained_cfg["classifier"]}.{name}' for name in ('weight', 'bias')]


def _input_key(model: nn.Module) -> str:
    return f'{model.pretrained_cfg["first_conv"]}.weight'


def check_fit(
    state_dict: StateDict,
    model: nn.Module,
    source: Union[str, Path],
    fresh: Iterable[str] = (),
    advice: Optional[str] = None,
) -> None:
    """Raises RuntimeError, naming keys, unless state_dict has just the model's keys (but for `fresh`) and shapes.

    Integer or boolean values of floating parameters are errors too; NaN and infinite values are logged as a warning.

    Args:
        state_dict: Weights under the model's names.
        model: Module; one made by timm's builder where no advice is given.
        source: Where the weights are from.
        fresh: Keys that may be missing, unexpected or of any shape.
        advice: What to do about it.
    """
    own = model.state_dict()
    fresh = set(fresh)
    missing = [key for key in own if key not in state_dict and key not in fresh]
    unexpected = [key for key in state_dict if key not in own and key not in fresh]
    reshaped = [
        key for key in own if key in state_dict and key not in fresh and state_dict[key].shape != own[key].shape
    ]
    shapes = [f'{key} {tuple(state_dict[key].shape)} instead of {tuple(own[key].shape)}' for key in reshaped]
    shared = [key for key in own if key in state_dict and own[key].is_floating_point()]
    discrete = [key for key in shared if not state_dict[key].is_floating_point()]
    dtypes = [f'{key} {state_dict[key].dtype} instead of {own[key].dtype}' for key in discrete]
    problems = {'missing': missing, 'unexpected': unexpected, 'of another shape': shapes, 'not floating': dtypes}
    report = '; '.join(f'{kind}: {_shorten(keys)}' for kind, keys in problems.items() if keys)
    if report:
        advice = advice or _advice(state_dict, model, {*missing, *unexpected, *reshaped}, discrete)
        raise RuntimeError(f'{source} does not fit {type(model).__name__}: {report}. {advice}')
    _warn_of_non_finite(state_dict, {key: own[key] for key in shared if not state_dict[key].is_meta}, source)


def _warn_of_non_finite(state_dict: StateDict, own: StateDict, source: Union[str, Path]) -> None:
    bad = {key: int((~state_dict[key].to(value.dtype).isfinite()).sum()) for key, value in own.items()}
    counts = [f'{key} ({count} of {own[key].numel()})' for key, count in bad.items() if count]
    if counts:
        _logger.warning('%s has weights that are NaN or infinite: %s', source, _shorten(counts))


def _advice(state_dict: StateDict, model: nn.Module, keys: set[str], discrete: Sequence[str]) -> str:
    """What to do about keys that do not fit."""
    classifier, input_key = _classifier_keys(model), _input_key(model)
    advice = []
    if input_key in keys and getattr(state_dict.get(input_key), 'ndim', 0) == 4:
        channels = state_dict[input_key].shape[1]
        if channels != model.in_chans:
            advice.append(f'for images of its {channels} channels pass in_chans={channels}')
            keys = keys - {input_key}
    if keys & set(classifier):
        others = 'num_classes=0, another num_classes or features_only=True'
        advice.append(f'for weights without this classifier pass {others}')
    if keys - set(classifier):
        advice.insert(0, 'check the variant and its options')
    if discrete:
        advice.append('save the weights in a floating dtype')
    sentence = '; '.join(advice)
    return sentence[0].upper() + sentence[1:]


def reset_parameters(model: nn.Module) -> None:
    """Lets the modules of the model draw their parameters anew, children before what may set theirs otherwise."""
    for module in reversed(list(model.modules())):
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()


def _shorten(keys: list[str]) -> str:
    more = f' and {len(keys) - _NAMES_SHOWN} more' if len(keys) > _NAMES_SHOWN else ''
    return ', '.join(keys[:_NAMES_SHOWN]) + more


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
