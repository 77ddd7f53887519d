"""Building models with timm's builder, and strict checkpoint loading."""

import argparse
import logging
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, Dict, Iterable, Optional, Sequence, Tuple, Type, Union

import safetensors
import safetensors.torch
import torch
from timm.models import adapt_input_conv, build_model_with_cfg, clean_state_dict
from torch import Tensor, nn

from ..layers.options import check_indices

_logger = logging.getLogger(__name__)

StateDict = Dict[str, Tensor]

_NAMES_SHOWN = 12
_UNREADABLE = '{} is not a readable checkpoint: it is empty, corrupt or in another format'


def build_model(
    model_cls: Type[nn.Module],
    variant: str,
    pretrained: bool,
    feature_cfg: Dict[str, Any],
    pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
    **kwargs,
) -> nn.Module:
    """Builds a registered variant with timm's builder; official files load with the model's `load_pretrained`.

    Args:
        model_cls: Model class with the methods `load_pretrained(path)` and `filter_checkpoint(state_dict)`, which
            renames any known checkpoint layout to the model's.
        variant: Registered name.
        pretrained: Whether to load weights.
        feature_cfg: Default arguments of timm's feature extraction.
        pretrained_cfg_overlay: timm's overlay of the pretrained configuration, e.g. dict(file=path).
        **kwargs: Arguments of the model class and of timm's builder.

    Returns:
        The model, or timm's feature extractor around it with features_only=True.

    Raises:
        RuntimeError: If weights cannot be downloaded or do not fit the model.
        TypeError: If an argument is unknown.
        ValueError: If out_indices is empty, or of maps that the model does not have.
    """
    # timm's own loading prefers EMA weights and ignores missing keys if num_classes differs.
    check_indices(out_indices=kwargs.get('out_indices'))
    overlay = {'custom_load': 'hf', **(pretrained_cfg_overlay or {})}
    if kwargs.get('features_only'):
        kwargs.setdefault('num_classes', 0)

    def filter_and_check(state_dict: StateDict, model: nn.Module) -> StateDict:
        source = f'the checkpoint of {variant}'
        _check_tensors(state_dict, source)
        state_dict, fresh = _fit_classifier(model.filter_checkpoint(state_dict), model, source)
        adapted_by_timm = {_input_key(model)} & state_dict.keys()
        check_fit(state_dict, model, source, fresh={*fresh, *adapted_by_timm})
        # timm discards the classifier unless its number of classes is the pretrained configuration's.
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
    except IndexError as error:
        if not kwargs.get('out_indices'):
            raise
        raise ValueError(
            f'{variant} has fewer feature maps than out_indices={kwargs["out_indices"]!r} needs'
        ) from error
    except OSError as error:
        if not pretrained or isinstance(error, CheckpointFileError):
            raise
        raise _download_error(variant, error) from error
    except Exception as error:
        if pretrained and is_download_error(error):
            raise _download_error(variant, error) from error
        raise


def is_download_error(error: Exception) -> bool:
    """Whether the Hub's client raised an error, or the HTTP client that its version uses."""
    return type(error).__module__.split('.')[0] in ('huggingface_hub', 'httpx', 'httpx2', 'requests')


def _download_error(variant: str, error: Exception) -> RuntimeError:
    return RuntimeError(
        f'could not download the weights of {variant} ({error}); to load a local copy, use '
        f"timm.create_model('{variant}', pretrained=True, pretrained_cfg_overlay=dict(file='path/to/checkpoint'))"
    )


class _Inert:
    """Replaces a pickled object that is not needed: accepts any arguments and stores nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# Objects besides weights in official files. Vim's hold the training arguments, an argparse.Namespace; VMamba's hold
# records of mmengine and yacs with NumPy numbers, of which nothing is imported or run.
_RECORDS = {
    'yacs.config.CfgNode': OrderedDict,
    'mmengine.logging.history_buffer.HistoryBuffer': _Inert,
    'builtins.getattr': _Inert,  # used for the buffer's statistics; the real getattr could return any function
    'numpy.dtype': _Inert,
    'numpy.ndarray': _Inert,
    'numpy.core.multiarray._reconstruct': _Inert,
    'numpy._core.multiarray._reconstruct': _Inert,
    'numpy.core.multiarray.scalar': _Inert,
    'numpy._core.multiarray.scalar': _Inert,
}


class CheckpointFileError(FileNotFoundError):
    """The requested checkpoint file does not exist."""


def read_checkpoint(path: Union[str, Path], use_ema: bool = False) -> StateDict:
    """Reads the weights of a .safetensors or PyTorch file.

    PyTorch files are read with `weights_only`, and their checksums are verified if present. A PyTorch file holds the
    weights or a training checkpoint; of the latter, the first present of `state_dict_ema`, `state_dict` (timm), `model`
    and `model_ema` (official) and `network_weights` (nnU-Net) is used.

    Args:
        path: File.
        use_ema: Whether `model_ema` comes first.

    Returns:
        Weights by name.

    Raises:
        CheckpointFileError: If the file does not exist.
        RuntimeError: If the file is corrupt or holds other objects than weights.
    """
    return _select_weights(read_file(path), Path(path), use_ema)


def read_file(path: Union[str, Path]) -> Any:
    """Reads all that a .safetensors or PyTorch file holds; see `read_checkpoint` for how, and for the errors."""
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
            return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        raise RuntimeError(_refusal(path)) from error
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile, safetensors.SafetensorError) as error:
        raise RuntimeError(f'{path} is not a readable checkpoint: {error}') from error
    except Exception as error:  # unpickling a damaged file can raise anything, with a message that says nothing
        raise RuntimeError(_UNREADABLE.format(path)) from error


def check_sums(path: Path) -> None:
    """Raises RuntimeError with the first damaged entry if the file is an archive with a wrong checksum."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        summed = any(entry.CRC for entry in archive.infolist())  # torch can skip checksums: then all are 0
        damaged = archive.testzip() if summed else None
    if damaged is not None:
        raise RuntimeError(f'its entry {damaged} is damaged (wrong checksum): get a new copy of the file')


def _refusal(path: Path) -> str:
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a damaged file can raise anything
        found = []
    refused = [name for name in found if name not in ('argparse.Namespace', *_RECORDS)]
    if not refused:
        return _UNREADABLE.format(path)
    return (
        f'{path} holds more than weights: {", ".join(refused)}. Such objects could run code and are not loaded. If '
        f"you trust the file, extract its weights: torch.save(torch.load(path, weights_only=False)['model'], "
        f"'weights.pth') (or ['state_dict'], if they are under that key)"
    )


def _select_weights(checkpoint: Any, path: Path, use_ema: bool) -> StateDict:
    keys = ('state_dict_ema', 'state_dict', 'model', 'model_ema', 'network_weights')
    if isinstance(checkpoint, dict):
        for key in ('model_ema', *keys) if use_ema else keys:
            if isinstance(checkpoint.get(key), dict):
                checkpoint = checkpoint[key]
                break
    is_weights = isinstance(checkpoint, dict) and checkpoint and all(isinstance(v, Tensor) for v in checkpoint.values())
    if not is_weights:
        found = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise RuntimeError(f'{path} holds no weights: expected tensors, directly or under one of {keys}, found {found}')
    _check_tensors(checkpoint, path)
    return clean_state_dict(checkpoint)


def _check_tensors(state_dict: Dict[Any, Tensor], source: Union[str, Path]) -> None:
    """Raises RuntimeError with the key unless all keys are strings and all tensors are dense and not meta."""
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise RuntimeError(f'{source} has the key {key!r}: keys must be strings, as in a state_dict()')
        if value.is_meta or value.is_nested or value.layout != torch.strided:
            kind = 'meta' if value.is_meta else 'nested' if value.is_nested else str(value.layout).split('.')[-1]
            raise RuntimeError(f'{source} has a {kind} tensor as {key}: save weights as dense tensors with data')


def load_pretrained(model: nn.Module, path: Union[str, Path], use_ema: bool = False) -> None:
    """Loads a checkpoint in any known layout into a model made by timm's builder; every weight must be present.

    For another number of image channels, the input convolution is adapted as in timm. If the model was created with
    another num_classes than the pretrained configuration's, a classifier that does not fit is re-initialised, and this
    is logged.

    Args:
        model: Model with a `pretrained_cfg` and a method `filter_checkpoint`.
        path: File, as for `read_checkpoint`.
        use_ema: Whether to prefer the official EMA weights.

    Raises:
        CheckpointFileError: If the file does not exist.
        RuntimeError: If keys are missing, unexpected or of another shape; the message names them.
    """
    state_dict = model.filter_checkpoint(read_checkpoint(path, use_ema))
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
    """state_dict without a classifier that the model lacks or re-initialises, and the names re-initialised.

    A linear classifier fits a 1x1 convolution, which timm uses without pooling, and the reverse.
    """
    own, classifier = model.state_dict(), _classifier_keys(model)
    rest = {key: value for key, value in state_dict.items() if key not in classifier}
    if not any(key in own for key in classifier):
        return rest, ()
    weight = state_dict.get(classifier[0])
    if weight is not None and weight.ndim in (2, 4) and weight.shape[2:].numel() == 1:
        pixelwise = own[classifier[0]].ndim == 4
        state_dict = {
            **state_dict,
            classifier[0]: weight.flatten(1)[:, :, None, None] if pixelwise else weight.flatten(1),
        }
    fits = all(key in state_dict and state_dict[key].shape == own[key].shape for key in classifier)
    if fits or model.num_classes == model.pretrained_cfg['num_classes']:
        return state_dict, ()
    _logger.warning('%s has no classifier of %d classes: the head is re-initialised', source, model.num_classes)
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
    """Checks that state_dict has exactly the model's keys (except `fresh`) and shapes.

    NaN and infinite values are logged as a warning.

    Args:
        state_dict: Weights with the model's names.
        model: Module; must be made by timm's builder if no advice is given.
        source: Origin of the weights, for messages.
        fresh: Keys that may be missing, unexpected or of any shape.
        advice: End of the error message; by default derived from the problems.

    Raises:
        RuntimeError: If keys are missing, unexpected or of another shape, or integer or boolean weights are given for
            floating-point parameters. The message names the keys.
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
    """Advice about keys that do not fit."""
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
    """Calls `reset_parameters` of all modules, children before parents, which may override them."""
    for module in reversed(list(model.modules())):
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()


def _shorten(keys: list[str]) -> str:
    more = f' and {len(keys) - _NAMES_SHOWN} more' if len(keys) > _NAMES_SHOWN else ''
    return ', '.join(keys[:_NAMES_SHOWN]) + more


def rename(key: str, rules: Sequence[Tuple[str, str]]) -> str:
    """key after all substitutions (pattern, replacement), in order."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def split_backbone(state_dict: Dict[str, Tensor]) -> Tuple[Dict[str, Tensor], Dict[str, Tensor]]:
    """Splits a checkpoint into the classification model's weights and the output norms `outnorm{i}`.

    A detector or segmentor has its backbone under `backbone.`. A backbone of this library has its model under `model.`,
    next to the norms and, for Vim, the pyramid. All other keys of these are dropped. One of transformers has it under
    `timm_model.`. Other checkpoints pass unchanged.

    Args:
        state_dict: Weights in any layout.

    Returns:
        Weights of the model, and output norms.
    """
    if any(key.startswith('backbone.') for key in state_dict):
        state_dict = _below('backbone.', state_dict)
    norms = {key: value for key, value in state_dict.items() if key.startswith('outnorm')}
    weights = _below('model.', state_dict) or _below('timm_model.', state_dict)
    weights = weights or {key: value for key, value in state_dict.items() if key not in norms}
    return weights, norms


def with_fresh_norm(state_dict: Dict[str, Tensor], model: nn.Module) -> Dict[str, Tensor]:
    """Weights of a detection or segmentation checkpoint with a newly initialised final norm, if the model has one."""
    fresh = {
        key: torch.ones_like(value) if key.endswith(('weight', 'running_var')) else torch.zeros_like(value)
        for key, value in model.state_dict().items()
        if key.startswith('norm.') and key not in state_dict
    }
    if fresh:
        _logger.warning('a detection or segmentation checkpoint has no final norm: it is re-initialised')
    return {**state_dict, **fresh}


def _below(prefix: str, state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
