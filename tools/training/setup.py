"""The model and its optimizer, as a configuration describes them."""

import inspect
import re
from typing import Any, Dict, Optional

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import PretrainedCfg, get_pretrained_cfg
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationTask, LogitDistillationTask, TrainingTask
from torch import nn
from torch.optim import Optimizer

from vmamba.models.trained import preprocessing
from vmamba.tools.user_errors import UserError, as_user_error, nearest

from .config import Config


def create_model(config: Config, num_classes: int) -> nn.Module:
    """Builds the model with the weights to start from.

    Raises:
        UserError: If the name, an argument or the weights do not fit.
    """
    _check_model('model', config.model)
    args = {**_weights(config, num_classes), 'num_classes': num_classes, 'in_chans': config.in_chans}
    if config.drop_path is not None:
        args['drop_path_rate'] = config.drop_path
    if config.img_size and get_pretrained_cfg(config.model).fixed_input_size:
        args['img_size'] = config.img_size
    try:
        model = timm.create_model(config.model, **{**args, **config.model_args})
    except (RuntimeError, OSError, TypeError, ValueError, AssertionError) as error:
        if config.pretrained and is_download(error):
            raise UserError(
                f'cannot download the published weights of {config.model} ({_one_line(error)}); give --checkpoint FILE '
                'with a copy of them, or --from-scratch for random weights'
            ) from error
        raise UserError(f'cannot build {config.model}: {_one_line(error)}{_way_out(config, error)}') from error
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return model


def _check_model(key: str, name: str) -> None:
    if not timm.is_model(name):
        known = timm.list_models() if '.' not in name else timm.list_pretrained()
        raise UserError(f'there is no {key} {name!r}{nearest(name, known)}')


def is_download(error: Exception) -> bool:
    """Whether published weights could not be downloaded, by this library or by timm."""
    return isinstance(error, OSError) or str(error).startswith('could not download')


def _one_line(error: Exception) -> str:
    first = error.__cause__ if str(error).startswith('could not download') else None
    return ' '.join(str(first or error).split()) or type(error).__name__


def _way_out(config: Config, error: Exception) -> str:
    """What the error of building a model leaves for the person to guess."""
    classifier = get_pretrained_cfg(config.model).classifier
    if config.checkpoint and not config.new_head and isinstance(classifier, str) and classifier in str(error):
        return ' Or, if only the classifier differs: --new-head'
    if isinstance(error, TypeError):
        return _guess_argument(error, type(timm.create_model(config.model)))
    return ''


def _guess_argument(error: Exception, kind: type) -> str:
    """A question for the argument of a class that is most like the one it does not know."""
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    return nearest(found[1], inspect.signature(kind).parameters) if found else ''


def _weights(config: Config, num_classes: int) -> Dict[str, Any]:
    """Arguments of timm.create_model for the weights to start from."""
    if config.checkpoint:
        # No number of classes is -1: then weights with another classifier are those of a backbone.
        overlay = dict(file=config.checkpoint, num_classes=-1 if config.new_head else num_classes)
        return dict(pretrained=True, pretrained_cfg_overlay=overlay)
    if config.pretrained:
        published = _published(config.model, 'give --checkpoint FILE, or --from-scratch for random weights')
        if published.num_classes != num_classes and not config.new_head:
            raise UserError(
                f'the published weights of {config.model} have {published.num_classes} classes, the data '
                f'{num_classes}; --new-head re-initialises the classifier'
            )
    return dict(pretrained=config.pretrained)


def _published(name: str, advice: str) -> PretrainedCfg:
    """The configuration of published weights."""
    published = get_pretrained_cfg(name)
    if not published.has_weights:
        raise UserError(f'{name} has no published weights: {advice}')
    return published


def starts_from_scratch(config: Config) -> bool:
    """Whether a run with settings for fine-tuning starts from random weights."""
    return (config.new_head or config.layer_decay is not None) and not (config.pretrained or config.checkpoint)


def data_config_of(config: Config, model: nn.Module) -> Dict[str, Any]:
    """Size, interpolation, normalisation and crop of the images that a model takes."""
    return preprocessing(model, config.in_chans, config.img_size, config.crop_pct)


def describe(
    config: Config, data_config: Dict[str, Any], num_classes: int, classes: Optional[Dict[str, int]]
) -> Dict[str, Any]:
    """What it takes to evaluate the weights of a run as the run does: plain values, which best.pt keeps."""
    kept = {key: data_config[key] for key in ('crop_pct', 'crop_mode', 'interpolation')}
    return dict(
        model=config.model,
        model_args=config.model_args,
        num_classes=num_classes,
        in_chans=config.in_chans,
        img_size=data_config['input_size'][-1],
        mean=list(data_config['mean']),
        std=list(data_config['std']),
        class_names=classes and sorted(classes, key=classes.get),
        **kept,
    )


def create_task(config: Config, model: nn.Module, device: torch.device) -> TrainingTask:
    """The model with its loss and moving average, by timm's task."""
    soft = config.mixup > 0 or config.cutmix > 0
    criterion = SoftTargetCrossEntropy() if soft else LabelSmoothingCrossEntropy(config.smoothing)
    args = dict(criterion=criterion, device=device, verbose=False)
    if config.teacher:
        _check_teacher(config, model.num_classes)
        weights = dict(distill_loss_weight=config.distill_weight, temperature=config.distill_temperature)
        teacher = dict(teacher_model=config.teacher, teacher_pretrained_path=config.teacher_checkpoint)
        with as_user_error(f'cannot build the teacher {config.teacher}'):
            task = LogitDistillationTask(model, **teacher, **weights, **args)
    else:
        task = ClassificationTask(model, **args)
    if config.ema_decay is not None:
        task.setup_ema(decay=config.ema_decay, use_warmup=config.ema_warmup)
    return task


def _check_teacher(config: Config, num_classes: int) -> None:
    """Raises UserError for a teacher whose classifier timm would replace, so that it taught at random."""
    _check_model('teacher', config.teacher)
    if config.teacher_checkpoint:
        return
    classes = _published(config.teacher, 'give --teacher-checkpoint FILE').num_classes
    if classes != num_classes:
        raise UserError(
            f'the published weights of the teacher {config.teacher} have {classes} classes, the data {num_classes}; '
            f'give --teacher-checkpoint FILE with those classes'
        )


def create_optimizer(config: Config, model: nn.Module, update_size: int) -> Optimizer:
    """The optimizer, with weight and layer decay as the model asks for."""
    name = config.opt.lower().removeprefix('lookahead_')
    if name not in list_optimizers():
        raise UserError(f'there is no optimizer {config.opt!r}{nearest(config.opt, list_optimizers())}')
    lr = config.lr if config.lr is not None else config.lr_base * update_size / 512
    decays = dict(weight_decay=config.weight_decay, layer_decay=config.layer_decay)
    try:
        return create_optimizer_v2(model, opt=config.opt, lr=lr, **decays, **config.opt_args)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        guess = _guess_argument(error, get_optimizer_class(name, bind_defaults=False))
        raise UserError(f'opt_args {config.opt_args} do not fit {config.opt}: {_one_line(error)}{guess}') from error


def create_scheduler(config: Config, optimizer: Optimizer, updates_per_epoch: int) -> Optional[Scheduler]:
    """The learning rate as a function of the number of updates."""
    # timm's schedule takes all of its epochs after a warm-up that stands before it: the run's epochs include both.
    epochs = config.epochs - config.warmup_epochs * config.warmup_prefix
    lengths = dict(num_epochs=epochs, warmup_epochs=config.warmup_epochs, updates_per_epoch=updates_per_epoch)
    rates = dict(warmup_lr=config.warmup_lr, min_lr=config.min_lr, warmup_prefix=config.warmup_prefix)
    with as_user_error():
        return create_scheduler_v2(optimizer, config.sched, **lengths, **rates, step_on_epochs=False)[0]
