"""Models of the checkpoints that `vmamba train` writes."""

from pathlib import Path
from typing import Any, Dict, Optional, Union

import timm
from timm.data import resolve_data_config
from torch import nn

from ._pretrained import read_file


def load(path: Union[str, Path], **kwargs: Any) -> nn.Module:
    """Builds the model of a checkpoint that `vmamba train` wrote, with its weights, in evaluation mode on the CPU.

    The weights are those of the moving average if the file has it. `model.class_names` lists the names of the classes
    (None if the data had none). `timm.data.resolve_data_config(model=model)` gives the preprocessing of the run's
    validation.

    Args:
        path: best.pt or checkpoint-*.pt in the folder of a run.
        **kwargs: Arguments of timm.create_model, which replace those of the run, such as num_classes=0.

    Raises:
        FileNotFoundError: If there is no such file.
        RuntimeError: If the file is corrupt, or its weights do not fit the arguments.
        ValueError: If `vmamba train` did not write the file.
    """
    facts = run_facts(read_file(path))
    if not facts:
        raise ValueError(
            f'{path} does not say which model it is of, so `vmamba train` did not write it: '
            f"use timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file='{path}'))"
        )
    args = {'num_classes': facts['num_classes'], **model_args(facts), **kwargs}
    overlay = dict(file=str(path), num_classes=args['num_classes'] or facts['num_classes'])
    model = timm.create_model(facts['model'], pretrained=True, pretrained_cfg_overlay=overlay, **args).eval()
    set_preprocessing(model, facts, args['in_chans'])
    model.class_names = facts.get('class_names')
    return model


def run_facts(content: Any) -> Dict[str, Any]:
    """What a checkpoint of `vmamba train` stores about its model; empty for other files.

    Args:
        content: Of the file, see `read_file`.

    Returns:
        The entries `model`, `model_args`, `in_chans`, `img_size`, `num_classes`, `class_names`, and those of the
        preprocessing as far as the file has them.
    """
    config = content.get('config') if isinstance(content, dict) else None
    if not isinstance(config, dict) or not {'model', 'model_args', 'in_chans'} <= config.keys():
        return {}
    facts = dict(config)
    if 'data' in content:  # a checkpoint to resume from: it holds the settings of the run
        facts.update(num_classes=content['num_classes'], class_names=content['data']['classes'])
        facts.pop('interpolation', None)  # of training
    return facts


def model_args(facts: Dict[str, Any]) -> Dict[str, Any]:
    """The arguments with which a run built its model, except the number of classes."""
    sized = facts.get('img_size') and timm.get_pretrained_cfg(facts['model']).fixed_input_size
    size = {'img_size': facts['img_size']} if sized else {}
    return {'in_chans': facts['in_chans'], **size, **facts['model_args']}


def preprocessing(
    model: nn.Module, in_chans: int = 3, img_size: Optional[int] = None, crop_pct: Optional[float] = None
) -> Dict[str, Any]:
    """timm's data configuration of a model: its own, with a mean and standard deviation of 0.5 for grey images."""
    cfg = {**model.pretrained_cfg}
    if img_size is None:
        cfg['input_size'] = (in_chans, *cfg['input_size'][1:])
    if in_chans == 1:
        cfg.update(mean=(0.5,), std=(0.5,))
    return resolve_data_config(dict(in_chans=in_chans, img_size=img_size, crop_pct=crop_pct), pretrained_cfg=cfg)


def set_preprocessing(model: nn.Module, facts: Dict[str, Any], in_chans: int) -> None:
    """Puts the preprocessing of a run's validation into the model's `pretrained_cfg`.

    Args:
        model: Changed in place.
        facts: Of `run_facts`; without them, only the rule for grey images applies.
        in_chans: Of the model; if the run's was another one, its mean and standard deviation do not apply.
    """
    config = preprocessing(model, in_chans, facts.get('img_size'), facts.get('crop_pct'))
    if 'mean' in facts and in_chans == facts['in_chans']:
        config.update(mean=tuple(facts['mean']), std=tuple(facts['std']))
        config.update({key: facts[key] for key in ('interpolation', 'crop_mode') if key in facts})
    model.pretrained_cfg = {**model.pretrained_cfg, **config}
