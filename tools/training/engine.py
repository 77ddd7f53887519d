"""The training loop, and the state that it can be continued from."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from torch.optim import Optimizer

from vmamba.layers import auxiliary_loss, expert_load
from vmamba.sequence.checkpoint import write_pretrained
from vmamba.tools.devices import autocast
from vmamba.tools.images.batches import hits
from vmamba.tools.user_errors import UserError

from .checkpoint import Checkpoints, check_same_run
from .config import Config
from .data import Batch, Parts
from .parallel import Parallel, whole
from .report import UNITS, Report
from .runtime import Runtime, StopRequest, peak_memory_mib
from .seeding import derive_seed, seed_all
from .setup import create_scheduler


class Trainer:
    """Trains a task, epoch after epoch."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        task: TrainingTask,
        parallel: Parallel,
        optimizer: Optimizer,
        parts: Parts,
        report: Report,
    ) -> None:
        self.config, self.runtime, self.task, self.parallel, self.optimizer = config, runtime, task, parallel, optimizer
        self.data, self.validation, self.facts, self.report = parts.data, parts.validation, parts.facts, report
        self.num_classes = self.facts['num_classes']
        self.update_size = config.batch_size * config.accumulate * runtime.world
        self.unit, self.rate_factor = UNITS[config.task], config.seq_len if config.task == 'language' else 1
        self.scheduler = create_scheduler(config, optimizer, self.data.updates_per_epoch)
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=config.precision == 'fp16')
        self.mix = _mixup(config, self.num_classes)
        erases = config.augment and config.reprob > 0
        self.erase = (
            RandomErasing(config.reprob, mode=config.remode, device=runtime.device) if erases else nn.Identity()
        )
        self.checkpoints = Checkpoints(Path(config.output), config.keep_checkpoints)
        self.last_saved: Optional[Path] = None
        self.stop = StopRequest()
        # The position of the next update, and the results up to it.
        self.update, self.epoch, self.position = 0, 0, 0
        self.sums = torch.zeros(3, dtype=torch.float64, device=runtime.device)  # loss, images, norms of gradients
        self.history: List[Dict[str, float]] = []
        self.best = -math.inf

    def run(self) -> None:
        """Trains from the current position to the last epoch."""
        while self.epoch < self.config.epochs:
            start, done = time.perf_counter(), self.update
            self._train_epoch()
            loss = self._mean_loss()  # waits for the GPU
            seconds = time.perf_counter() - start
            rate = (self.update - done) * self.update_size * self.rate_factor / seconds
            row = dict(epoch=self.epoch + 1, updates=self.update, lr=self._lr(), train_loss=loss)
            row.update(self._expert_load())
            row.update(self._validate())
            row[f'{self.unit}_per_second'] = round(rate, 1)
            row.update(memory_mib=round(peak_memory_mib(self.runtime.device), 1))
            self._end_epoch(row)
        self.report.finish(self.history)

    def _train_epoch(self) -> None:
        """The rest of the epoch."""
        self.task.train()
        batches = self.data.batches(self.epoch, self.position)
        self.report.start_epoch(self.epoch, self.config.epochs, self.position, self.data.updates_per_epoch)
        start, logged = time.perf_counter(), (self.update, self.sums.clone())
        while self.position < self.data.updates_per_epoch:
            self._update(batches)
            if self.update % self.config.log_every == 0:
                loss = self._mean_loss(logged[1])
                seconds, start = time.perf_counter() - start, time.perf_counter()
                rate = (self.update - logged[0]) * self.update_size * self.rate_factor / seconds
                logged = self.update, self.sums.clone()
                memory = peak_memory_mib(self.runtime.device)
                self.report.progress(self.update, self.position, loss, self._lr(), rate, memory)
            if self.config.checkpoint_every and self.update % self.config.checkpoint_every == 0:
                self._save()
            self._stop_if_asked()

    def _update(self, batches: Iterator[Batch]) -> None:
        """One update of the weights, from as many batches as the configuration says."""
        for step in range(self.config.accumulate):
            batch = next(batches, None)
            if batch is None:
                raise UserError(f'the data ended after update {self.update}: it has fewer images than its length says')
            seed_all(derive_seed(self.config.seed, self.runtime.rank, self.update, step))
            if step < self.config.accumulate - 1:
                with self.parallel.no_sync():
                    self._backward(batch)
            else:
                self._backward(batch)
        self.scaler.unscale_(self.optimizer)
        norm = self._clip().double()
        # With loss scaling infinite gradients are expected: the update is skipped and the scale halved.
        self.sums[2] += norm if not self.scaler.is_enabled() else norm.nan_to_num(0, 0, 0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.update += 1
        self.position += 1
        self.task.update_ema(step=self.update)
        if self.scheduler:
            self.scheduler.step_update(self.update)

    def _backward(self, batch: Batch) -> None:
        images, targets = self.erase(batch.images), batch.targets
        if self.mix:
            images, targets = self.mix(images, targets)
        loss = self._loss(images, targets)
        self.scaler.scale(loss * batch.weight).backward()
        self.sums[0] += loss.detach().double() * batch.count
        self.sums[1] += batch.count

    def _loss(self, images: Tensor, targets: Tensor) -> Tensor:
        with autocast(self.runtime.device, self.config.precision):
            loss = self.task(self._laid_out(images), targets)['loss']
        return loss + auxiliary_loss(self.task.get_trainable_module())

    def _laid_out(self, images: Any) -> Any:
        return images.contiguous(memory_format=torch.channels_last) if self.config.channels_last else images

    def _clip(self) -> Tensor:
        """Limits the gradients; returns their norm before."""
        limit, mode = self.config.clip_grad, self.config.clip_mode
        by_norm = limit is not None and mode == 'norm'
        norm = whole(nn.utils.clip_grad_norm_(self.task.get_clip_parameters(), limit if by_norm else math.inf))
        if limit is not None and mode != 'norm':
            dispatch_clip_grad(self.task.get_clip_parameters(exclude_head=mode == 'agc'), limit, mode)
        return norm

    def _mean_loss(self, since: Optional[Tensor] = None) -> float:
        """Mean loss over all processes, since an earlier state of the sums or the start of the epoch."""
        self._check_finite()
        loss, count, _ = self.runtime.sum(self.sums - since if since is not None else self.sums.clone())
        return loss / max(count, 1)

    def _check_finite(self) -> None:
        if self.sums.isfinite().all():
            return
        what = 'gradient' if self.sums[0].isfinite() else 'loss'
        saved = f'the last good checkpoint is {self.last_saved}' if self.last_saved else 'there is no checkpoint yet'
        others = {'fp16': ' or choose precision bf16 or fp32', 'bf16': ' or choose precision fp32', 'fp32': ''}
        clip = 'set clip_grad' if self.config.clip_grad is None else f'lower clip_grad ({self.config.clip_grad:g})'
        raise UserError(
            f'the {what} is not a finite number at or before update {self.update} (epoch {self.epoch + 1}); {saved}; '
            f'lower lr, {clip}{others[self.config.precision]}'
        )

    def _expert_load(self) -> Dict[str, float]:
        """Of a model with experts, the tokens of the busiest one in the last step, relative to an equal share."""
        loads = expert_load(self.task.get_trainable_module()).values()
        return {'max_expert_load': max(len(load) * load.max().item() for load in loads)} if loads else {}

    def _lr(self) -> float:
        return max(group['lr'] for group in self.optimizer.param_groups)

    def _validate(self) -> Dict[str, float]:
        """Loss and accuracies of the model, and accuracies of its moving average."""
        if self.validation is None:
            return {}
        self.report.say_status('validating')
        self.task.eval()
        models = self.parallel.eval_models()
        # Of each model: loss, top-1, top-5, images.
        scores = torch.zeros(len(models), 4, dtype=torch.float64, device=self.runtime.device)
        for _, images, targets in self.validation:
            images = self._laid_out(images)
            scores += torch.stack([self._score(model, images, targets) for model in models])
            if self.parallel.saves_alone:  # else all would have to stop at once, and not all have as many batches
                self._stop_if_asked()
        (loss, top1, top5, count), *averaged = self.runtime.sum(scores)
        if not count:
            raise UserError('none of the images to validate on can be read; repair them')
        row = dict(val_loss=loss / count, val_top1=top1 / count, val_top5=top5 / count)
        if self.config.task == 'language':
            row['val_bits_per_byte'] = row['val_loss'] / math.log(2)
        for _, top1, top5, _ in averaged:
            row.update(ema_top1=top1 / count, ema_top5=top5 / count)
        return row

    @torch.inference_mode()
    def _score(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Sums of loss, percentages of right answers, and their number."""
        with autocast(self.runtime.device, self.config.precision):
            logits = model(images) if isinstance(images, Tensor) else model(*images)
        logits, targets = logits.flatten(0, -2).float(), targets.flatten()
        loss = nn.functional.cross_entropy(logits, targets, reduction='sum').double()
        top1, top5 = 100 * hits(logits, targets).double().sum(dim=0)
        return torch.stack([loss, top1, top5, (targets >= 0).sum().double()])

    def _end_epoch(self, row: Dict[str, float]) -> None:
        """Goes to the start of the next epoch, reports this one and saves."""
        self.history.append(row)
        self.epoch, self.position = self.epoch + 1, 0
        self.sums.zero_()
        for part in (self.data, self.validation):
            note = part.samples.report() if part and part.samples else ''
            if note:
                self.report.warn(note)
        averaged = row.get('ema_top1', -math.inf) >= row.get('val_top1', math.inf)
        score = row['ema_top1'] if averaged else row.get('val_top1', -row['train_loss'])
        score = -row['val_loss'] if self.config.task == 'language' else score
        improved = score > self.best
        self.best = max(score, self.best)
        self.report.end_epoch(self.history)
        # Before the checkpoint, which marks the epoch as done: after a kill in between, both are repeated.
        if improved:
            self._save_best(row, averaged)
        self._save()

    def _stop_if_asked(self) -> None:
        number = self.parallel.stop_signal(self.stop.signal)
        if number:
            self._save(alone=self.parallel.saves_alone)
            self.report.say(f'stopped by signal {number} after update {self.update}; --resume continues the run')
            self.report.close()
            self.stop.exit(number)

    def _weights(self) -> Dict[str, Any]:
        state = self.task.get_checkpoint_state()
        return {**state, **self.task.get_checkpoint_state(ema=True)} if self.task.has_ema() else state

    def _save_best(self, row: Dict[str, float], averaged: bool) -> None:
        """Writes the weights that scored best, and no others: loaders of a file with both take the average."""
        weights = whole(self.task.get_checkpoint_state(ema=averaged))
        state = weights['state_dict_ema' if averaged else 'state_dict']
        if self.runtime.is_primary:
            settings = dict(config=self.facts, recipe=dataclasses.asdict(self.config))
            self.checkpoints.save_best({'state_dict': state, 'averaged': averaged, **settings, **row})
            if self.config.task == 'language':
                write_pretrained(self.checkpoints.folder / 'best', self.facts['model_args'], state)
            if self.task.has_ema():
                self.report.say(f'best.pt has {"the moving average" if averaged else "the weights themselves"}')

    def _save(self, alone: bool = False) -> None:
        """Writes a checkpoint, unless losses or gradients are not finite.

        Args:
            alone: The other processes do not take part: their losses are estimated by those of this one.
        """
        self._check_finite()
        sums = (
            self.sums.cpu() * self.runtime.world
            if alone
            else torch.tensor(self.runtime.sum(self.sums.clone()), dtype=torch.float64)
        )
        if self.parallel.saves_alone and not self.runtime.is_primary:
            return
        state = self.parallel.gather({**self._weights(), 'optimizer': self.optimizer.state_dict()})
        if not self.runtime.is_primary:
            return
        state.update(
            scaler=self.scaler.state_dict(),
            config=dataclasses.asdict(self.config),
            num_classes=self.num_classes,
            data=self._data_facts(),
            update_size=self.update_size,
            sums=sums,
            carried=self._carried(),
            **{key: getattr(self, key) for key in ('update', 'epoch', 'position', 'history', 'best')},
        )
        self.last_saved = self.checkpoints.save(state, self.update)

    def resume(self) -> bool:
        """Loads the newest readable checkpoint; starts a new run, with a message, if there is none.

        Raises:
            UserError: If the checkpoint belongs to another run.
        """
        found = self.checkpoints.load_newest(self.report.warn)
        if found is None:
            self.report.say(f'nothing to resume in {self.config.output}: starting a new run')
            return False
        state, path = found
        ours = dict(num_classes=self.num_classes, update_size=self.update_size, data=self._data_facts())
        check_same_run(state, {**ours, 'config': dataclasses.asdict(self.config)}, path)
        self.parallel.load(state, self.optimizer)
        self.scaler.load_state_dict(state['scaler'])
        self.sums.copy_(state['sums'] * self.runtime.is_primary)  # they are those of all processes
        for tensor, saved in zip(self._carried(), state.get('carried', [])):
            tensor.copy_(saved)
        for key in ('update', 'epoch', 'position', 'history', 'best'):
            setattr(self, key, state[key])
        self.last_saved = path
        self.report.say(f'resumed from {path}: epoch {self.epoch + 1}, update {self.update}')
        return True

    def _carried(self) -> List[Tensor]:
        """The state that a language model carries to the next window."""
        return self.data.carried() if self.config.task == 'language' else []

    def _data_facts(self) -> Dict[str, Any]:
        """What identifies the data of the run."""
        validated = len(self.validation) if self.validation else 0
        return {'images': len(self.data), 'validation images': validated, 'classes': self.facts['class_names']}


def _mixup(config: Config, num_classes: int) -> Optional[Mixup]:
    if config.mixup <= 0 and config.cutmix <= 0:
        return None
    names = dict(prob=config.mixup_prob, switch_prob=config.mixup_switch_prob, mode=config.mixup_mode)
    return Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=num_classes, **names)
