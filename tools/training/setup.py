"""The model and its optimizer, as a configuration describes them."""

from typing import Any, Dict, Optional

import timm
import torch
from timm.data import resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import get_pretrained_cfg
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationTask, LogitDistillationTask, TrainingTask
from torch import nn
from torch.optim import Optimizer
from user_errors import UserError

from .config import Config, nearest


def create_model(config: Config, num_classes: int) -> nn.Module:
    """Builds the model with the weights to start from.

    Raises:
        UserError: If the name, an argument or the weights do not fit.
    """
    if not timm.is_model(config.model):
        raise UserError(f'there is no model {config.model!r}{nearest(config.model, timm.list_models())}')
    args = {**_weights(config, num_classes), 'num_classes': num_classes, 'in_chans': config.in_chans}
    if config.drop_path is not None:
        args['drop_path_rate'] = config.drop_path
    if config.img_size and get_pretrained_cfg(config.model).fixed_input_size:
        args['img_size'] = config.img_size
    try:
        model = timm.create_model(config.model, **{**args, **config.model_args})
    except (RuntimeError, OSError, TypeError, ValueError) as error:
        raise UserError(f'cannot build {config.model}: {" ".join(str(error).split())}') from error
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return model


def _weights(config: Config, num_classes: int) -> Dict[str, Any]:
    """Arguments of timm.create_model for the weights to start from."""
    if config.checkpoint:
        # No number of classes is -1: then weights with another classifier are those of a backbone.
        overlay = dict(file=config.checkpoint, num_classes=-1 if config.new_head else num_classes)
        return dict(pretrained=True, pretrained_cfg_overlay=overlay)
    published = get_pretrained_cfg(config.model).num_classes
    if config.pretrained and published != num_classes and not config.new_head:
        raise UserError(
            f'the published weights of {config.model} have {published} classes, the data {num_classes}; '
            f'--new-head starts a new classifier'
        )
    return dict(pretrained=config.pretrained)


def data_config_of(config: Config, model: nn.Module) -> Dict[str, Any]:
    """Size, interpolation, normalisation and crop of the images that a model takes."""
    wanted = dict(in_chans=config.in_chans, img_size=config.img_size, crop_pct=config.crop_pct)
    cfg = {**model.pretrained_cfg}
    if config.img_size is None:
        cfg['input_size'] = (config.in_chans, *cfg['input_size'][1:])
    if config.in_chans == 1:
        cfg.update(mean=(0.5,), std=(0.5,))
    return resolve_data_config(wanted, pretrained_cfg=cfg)


def create_task(config: Config, model: nn.Module, device: torch.device) -> TrainingTask:
    """The model with its loss and moving average, by timm's task."""
    soft = config.mixup > 0 or config.cutmix > 0
    criterion = SoftTargetCrossEntropy() if soft else LabelSmoothingCrossEntropy(config.smoothing)
    args = dict(criterion=criterion, device=device, verbose=False)
    if config.teacher:
        weights = dict(distill_loss_weight=config.distill_weight, temperature=config.distill_temperature)
        teacher = dict(teacher_model=config.teacher, teacher_pretrained_path=config.teacher_checkpoint)
        try:
            task = LogitDistillationTask(model, **teacher, **weights, **args)
        except (RuntimeError, OSError) as error:
            raise UserError(f'cannot build the teacher {config.teacher}: {" ".join(str(error).split())}') from error
    else:
        task = ClassificationTask(model, **args)
    if config.ema_decay is not None:
        task.setup_ema(decay=config.ema_decay)
    return task


def create_optimizer(config: Config, model: nn.Module, update_size: int) -> Optimizer:
    """The optimizer, with weight and layer decay as the model asks for."""
    if config.opt.lower() not in list_optimizers():
        raise UserError(f'there is no optimizer {config.opt!r}{nearest(config.opt, list_optimizers())}')
    lr = config.lr if config.lr is not None else config.lr_base * update_size / 512
    decays = dict(weight_decay=config.weight_decay, layer_decay=config.layer_decay)
    try:
        return create_optimizer_v2(model, opt=config.opt, lr=lr, **decays, **config.opt_args)
    except TypeError as error:
        raise UserError(f'opt_args do not fit {config.opt}: {error}') from error


def create_scheduler(config: Config, optimizer: Optimizer, updates_per_epoch: int) -> Optional[Scheduler]:
    """The learning rate as a function of the number of updates."""
    if config.sched == 'plateau':
        raise UserError('the schedule plateau looks at scores, not at updates; choose another, such as cosine')
    lengths = dict(num_epochs=config.epochs, warmup_epochs=config.warmup_epochs, updates_per_epoch=updates_per_epoch)
    rates = dict(warmup_lr=config.warmup_lr, min_lr=config.min_lr)
    try:
        return create_scheduler_v2(optimizer, config.sched, **lengths, **rates, step_on_epochs=False)[0]
    except ValueError as error:
        raise UserError(str(error)) from error
