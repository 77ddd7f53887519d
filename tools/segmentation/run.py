"""A training of U-Mamba, from its configuration to its scores and pictures."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import pandas as pd
import yaml

from vmamba.models import UMamba
from vmamba.models._pretrained import read_file
from vmamba.tools.output_files import lock_folder, write_csv, write_text, writing
from vmamba.tools.training.checkpoint import Checkpoints, check_output
from vmamba.tools.training.report import Report
from vmamba.tools.training.runtime import Runtime, StopRequest, peak_memory_mib, start
from vmamba.tools.training.seeding import seed_all
from vmamba.tools.user_errors import UserError, as_user_error, changes

from .config import Config
from .data import Patches, split, whole_cases
from .engine import Engine

SCORES = {'dice': 'Dice', 'surface_dice': 'surface Dice'}
# Keys that may change when a run is resumed.
FREE_KEYS = {'output', 'workers', 'cache', 'log', 'device', 'compile', 'checkpoint', 'data', 'val_data', 'draw'}


def train(config: Config, resume: bool) -> List[Dict[str, float]]:
    """Trains as configured; returns the metrics of each epoch.

    Raises:
        UserError: If a setting does not fit the network, the data or the machine, the loss is no finite number, or the
            output folder holds a run that is not to be resumed.
    """
    runtime = start(config.device)
    if runtime.world > 1:
        raise UserError('networks for segmentation train in one process; nnU-Net trains them in several')
    check_output(config.output, resume)
    with lock_folder(Path(config.output)):
        trainer = Trainer(config, runtime)
        try:
            trainer.run(resume)
        finally:
            trainer.stop.restore()
            trainer.report.close()
    return trainer.history


def create_network(config: Config) -> UMamba:
    """The network of a configuration, with the weights to start from.

    Raises:
        UserError: If the sizes do not fit each other, or the weights do not fit the network.
    """
    keys = ('kind', 'in_chans', 'num_classes', 'patch_size', 'features', 'kernel_sizes', 'strides')
    options = ('encoder_blocks', 'decoder_blocks', 'deep_supervision', 'mixer')
    with as_user_error('cannot build the network'):
        network = UMamba(**{key: getattr(config, key) for key in (*keys, *options)})
        network.check_size(network.patch_size)
        if config.checkpoint:
            network.load_pretrained(config.checkpoint)
    return network


def load_network(path: Union[str, Path]) -> UMamba:
    """The network of a best.pt that `train` wrote, in evaluation mode on the CPU.

    Raises:
        UserError: If the file is of another kind.
    """
    content = read_file(path)
    config = content.get('config') if isinstance(content, dict) else None
    if not isinstance(config, dict) or config.get('task') != 'segmentation':
        raise UserError(f'{path} is no checkpoint of a training for segmentation by `vmamba train`')
    network = create_network(Config(**{**config, 'checkpoint': None, 'deep_supervision': False}))
    network.load_state_dict(content['state_dict'])
    return network.eval()


class Trainer:
    """A run and its position."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config, self.device, self.report = config, runtime.device, Report(config, runtime)
        config.precision = config.precision or ('bf16' if self.device.type == 'cuda' else 'fp32')
        cases, held_out = split(config)
        self.report.say(f'{len(cases)} images to train on, {len(held_out)} to validate on')
        seed_all(config.seed)
        self.network = create_network(config)
        count = sum(parameter.numel() for parameter in self.network.parameters()) / 1e6
        self.report.say(f'U-Mamba {config.kind}, mixer {config.mixer}: {count:.2f} M parameters, {config.precision}')
        self.engine = Engine(config, self.network, Patches(config, cases), self.device)
        self.held_out = whole_cases(config, held_out)
        self.checkpoints, self.stop = Checkpoints(Path(config.output), 2), StopRequest()
        self.epoch, self.best = 0, -math.inf
        self.history: List[Dict[str, float]] = []

    def run(self, resume: bool) -> None:
        """Trains to the last epoch, then evaluates the best weights."""
        config, output = self.config, Path(self.config.output)
        if resume:
            self._resume()
        with writing(output):
            self.checkpoints.remove_parts()
        write_text(output / 'config.yaml', yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
        self.report.open_records(self.epoch * config.iterations, self.epoch)
        while self.epoch < config.epochs:
            self._train_epoch()
            self._stop_if_asked()
        self._evaluate_best()
        self.report.finish(self.history)

    def _train_epoch(self) -> None:
        config, begin = self.config, time.perf_counter()
        self.report.start_epoch(self.epoch, config.epochs, 0, config.iterations)
        loss, rate = self.engine.train_epoch(self.epoch), self.engine.rate(self.epoch)
        speed = config.iterations * config.batch_size / (time.perf_counter() - begin)
        self.epoch += 1
        row = dict(epoch=self.epoch, updates=self.epoch * config.iterations, lr=rate, train_loss=loss)
        if self.epoch % config.val_every == 0 or self.epoch == config.epochs:
            self.report.say_status('validating')
            row['val_dice'] = self._mean(self.engine.evaluate(self.held_out), 'dice')
        row.update(images_per_second=round(speed, 2), memory_mib=round(peak_memory_mib(self.device), 1))
        self.history.append(row)
        self.report.end_epoch(self.history)
        # Before the checkpoint, which marks the epoch as done.
        if 'val_dice' in row and not row['val_dice'] <= self.best:  # the first is saved even without any label
            self.best = row['val_dice']
            self.checkpoints.save_best({'state_dict': self.network.state_dict(), **self._facts(), **row})
        self._save()

    def _mean(self, rows: List[Dict[str, Any]], key: str) -> float:
        return float(pd.DataFrame(rows).groupby('label')[key].mean().mean())

    def _evaluate_best(self) -> None:
        """Writes scores.csv with the scores of each case and class, and the pictures in drawn/."""
        output = Path(self.config.output)
        self.network.load_state_dict(read_file(output / 'best.pt')['state_dict'])
        with writing(output / 'drawn'):
            (output / 'drawn').mkdir(exist_ok=True)
        rows = self.engine.evaluate(self.held_out, surface=True, folder=output / 'drawn')
        write_csv(output / 'scores.csv', rows)
        found = ', '.join(f'{name} {self._mean(rows, key):.4f}' for key, name in SCORES.items())
        self.report.say(f'best weights: {found} (tolerance {self.config.surface_tolerance:g})')

    def _facts(self) -> Dict[str, Any]:
        return {'config': dataclasses.asdict(self.config)}

    def _save(self) -> None:
        parts = dict(state_dict=self.network, optimizer=self.engine.optimizer, scaler=self.engine.scaler)
        state = {key: part.state_dict() for key, part in parts.items()}
        state.update(self._facts(), epoch=self.epoch, history=self.history, best=self.best)
        self.checkpoints.save(state, self.epoch * self.config.iterations)

    def _resume(self) -> None:
        """Loads the newest readable checkpoint, if there is one."""
        found = self.checkpoints.load_newest(self.report.warn)
        if found is None:
            self.report.say(f'nothing to resume in {self.config.output}: starting a new run')
            return
        state, path = found
        was, now = state['config'], dataclasses.asdict(self.config)
        differences = changes(*({key: of[key] for key in of if key not in FREE_KEYS} for of in (was, now)))
        if differences:
            raise UserError(f'{path} is of a run with {differences}; give what it had, or another --output')
        self.network.load_state_dict(state['state_dict'])
        self.engine.optimizer.load_state_dict(state['optimizer'])
        self.engine.scaler.load_state_dict(state['scaler'])
        self.epoch, self.history, self.best = state['epoch'], state['history'], state['best']
        self.report.say(f'resumed from {path}: epoch {self.epoch + 1}')

    def _stop_if_asked(self) -> None:
        number: Optional[int] = self.stop.signal
        if number:
            self.report.say(f'stopped by signal {number} after epoch {self.epoch}; --resume continues the run')
            self.report.close()
            self.stop.exit(number)
