"""Training of classifiers of sequences: the parts that differ from those for images."""

from functools import partial
from pathlib import Path
from typing import Any, Dict, Tuple

import torch
import torch.nn.functional as F
from timm.task import ClassificationTask
from torch import Tensor, nn

from vmamba.models._pretrained import read_file
from vmamba.sequence.classifier import CAUSAL, SequenceClassifier
from vmamba.tools.sequences.tasks import NAMES, PREFIX, Task, load_task
from vmamba.tools.user_errors import UserError, as_user_error

from .config import Config
from .data import OrderedBatches, Parts, batch_order, check_epoch, sequence_loader, validate_sequences
from .runtime import Runtime
from .seeding import seed_all


def create_parts(config: Config, runtime: Runtime) -> Parts:
    """Model, data and facts of a run at its start.

    Raises:
        UserError: If a setting does not fit the model or the data.
    """
    _check(config)
    train, held_out = (
        load_task(config.data.removeprefix(PREFIX), split, config.data_dir, **config.data_args)
        for split in (config.train_split, config.val_split)
    )
    seed_all(config.seed)
    model = create_model(config, train.task).to(runtime.device)
    order = batch_order(train, config, runtime)
    data = OrderedBatches(sequence_loader(train, config, runtime, batch_sampler=order), order, runtime)
    check_epoch(data, 'sequences', config, runtime, 'lower batch_size')
    facts = dict(
        model=config.model,
        model_args=_model_args(config, train.task),
        num_classes=train.task.num_classes,
        class_names=None,
        data=config.data,
        data_dir=config.data_dir,
        data_args=config.data_args,
    )
    summary = f'{len(train)} sequences to train on, {len(held_out)} to validate on'
    return Parts(model, data, validate_sequences(held_out, config, runtime), facts, summary)


def load_classifier(path: Path) -> Tuple[SequenceClassifier, Dict[str, Any]]:
    """The best model of a run, and the run's facts.

    Raises:
        UserError: If the file is of another kind.
    """
    with as_user_error(f'cannot read {path}'):
        state = read_file(path)
    facts = state.get('config', {})
    if not str(facts.get('data', '')).startswith(PREFIX):
        raise UserError(f'{path} is not best.pt of a run with task: sequence')
    model = SequenceClassifier(facts['num_classes'], **facts['model_args'])
    model.load_state_dict(state['state_dict'])
    return model, facts


def create_task(config: Config, model: nn.Module, device: torch.device) -> ClassificationTask:
    """The model with its loss and moving average, by timm's task."""
    task = ClassificationTask(model, partial(_loss, smoothing=config.smoothing), device=device, verbose=False)
    if config.ema_decay is not None:
        task.setup_ema(decay=config.ema_decay, use_warmup=config.ema_warmup)
    return task


def _loss(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Of every sequence, or of every position that has a class: [B, ..., C], [B, ...]"""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), label_smoothing=smoothing)


def _check(config: Config) -> None:
    if not config.data.startswith(PREFIX):
        raise UserError(f'data of sequences must be {PREFIX} and one of {", ".join(NAMES)}, got {config.data!r}')
    images = 'shard', 'channels_last', 'teacher', 'mixup', 'cutmix', 'checkpoint', 'pretrained', 'grad_checkpointing'
    for key in images:
        if getattr(config, key):
            raise UserError(f'{key} is not for sequences: leave it out of the configuration')
    if config.train_split == config.val_split:
        raise UserError(f'train_split and val_split are both {config.val_split!r}: choose another split to validate on')


def _model_args(config: Config, task: Task) -> Dict[str, Any]:
    """Arguments of the classifier: `depth` and `feed_forward` make layers of the mixer that is named as the model."""
    args = dict(config.model_args)
    depth, feed_forward = args.pop('depth', 2), args.pop('feed_forward', 'none')
    data = dict(vocab_size=task.vocab_size, outputs=task.outputs, padding=task.padding)
    return {**data, 'layers': [[config.model, feed_forward]] * depth, **args}


def create_model(config: Config, task: Task) -> SequenceClassifier:
    """A classifier with random weights.

    Raises:
        UserError: If the name or an argument does not fit.
    """
    if config.model not in CAUSAL:
        raise UserError(f'model must be one of the mixers {", ".join(CAUSAL)}, got {config.model!r}')
    with as_user_error(f'cannot build {config.model}'):
        return SequenceClassifier(task.num_classes, **_model_args(config, task))
