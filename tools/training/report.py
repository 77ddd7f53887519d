"""Output of a run: lines or a progress bar, epochs.csv, a picture, TensorBoard and Weights & Biases."""

import importlib
import os
import sys
from pathlib import Path
from typing import Any, Dict, List

from vmamba.tools.output_files import write_csv, write_text, writing
from vmamba.tools.user_errors import UserError, program

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .config import Config
from .runtime import Runtime

# Of the speed, by task.
UNITS = {'classification': 'images', 'language': 'bytes', 'segmentation': 'images', 'sequence': 'sequences'}
LOGS = {'tensorboard': 'torch.utils.tensorboard', 'wandb': 'wandb'}  # modules, which take seconds to import


class TensorBoard:
    """Records in the run's folder; those after the given numbers of updates and epochs are dropped."""

    def __init__(self, module: Any, output: Path, config: Config, updates: int, epochs: int) -> None:
        self.folder = output / 'tensorboard'
        steps = {'update': updates, 'epoch': epochs}
        self.writers = {
            name: module.SummaryWriter(self.folder / name, purge_step=step + 1) for name, step in steps.items()
        }

    def add(self, name: str, values: Dict[str, float], step: int) -> None:
        with writing(self.folder / name):
            for key, value in values.items():
                self.writers[name].add_scalar(f'{name}/{key}', value, step)

    def close(self) -> None:
        for name, writer in self.writers.items():
            with writing(self.folder / name):
                writer.close()


class Wandb:
    """A run of Weights & Biases in the project of the environment (WANDB_PROJECT) or `vmamba`; resumed by its id."""

    def __init__(self, module: Any, output: Path, config: Config, updates: int, epochs: int) -> None:
        record = output / 'wandb.txt'
        run_id = record.read_text().strip() if record.is_file() and updates else None
        project = os.environ.get('WANDB_PROJECT', 'vmamba')
        names = dict(project=project, name=output.name, id=run_id, resume='allow', dir=str(output))
        self.run = module.init(**names, config=vars(config))
        write_text(record, self.run.id)
        for name in ('update', 'epoch'):  # W&B's own step cannot go back to a checkpoint
            self.run.define_metric(f'{name}/*', step_metric=f'{name}/step')

    def add(self, name: str, values: Dict[str, float], step: int) -> None:
        self.run.log({f'{name}/step': step, **{f'{name}/{key}': value for key, value in values.items()}})

    def close(self) -> None:
        self.run.finish()


class Report:
    """Shows and records the progress of a run; only the first process does.

    Raises:
        UserError: If the package of a log is missing.
    """

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config, self.output, self.runtime = config, Path(config.output), runtime
        self.unit = UNITS[config.task]
        self.console = Console(quiet=not runtime.is_primary, highlight=False, soft_wrap=True)
        self.modules = {name: _import(name) for name in config.log} if runtime.is_primary else {}
        self.logs: List[Any] = []
        self.bar = None

    def open_records(self, updates: int, epochs: int) -> None:
        """Opens the logs and the progress bar of a run that has done this many updates and epochs."""
        kinds = {'tensorboard': TensorBoard, 'wandb': Wandb}
        for name, module in self.modules.items():
            self.logs.append(kinds[name](module, self.output, self.config, updates, epochs))
        if self.runtime.is_primary and self.console.is_terminal:
            columns = TextColumn('{task.description}'), BarColumn(), TextColumn('{task.fields[status]}')
            self.bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)
            self.task = self.bar.add_task('', status='')
            self.bar.start()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """A line on standard error, from any process."""
        prefix = f'[process {self.runtime.rank}] ' if self.runtime.world > 1 else ''
        print(f'{program("train.py")}: warning: {prefix}{text}', file=sys.stderr, flush=True)

    def say_status(self, status: str) -> None:
        """Shows a state in the progress bar; plain lines leave it out."""
        if self.bar:
            self.bar.update(self.task, status=status)

    def start_epoch(self, epoch: int, epochs: int, position: int, updates: int) -> None:
        self.epoch, self.updates = epoch, updates
        if self.bar:
            name = f'epoch {epoch + 1}/{epochs}'
            self.bar.reset(self.task, description=name, total=updates, completed=position, status='')

    def progress(self, update: int, position: int, loss: float, lr: float, rate: float, memory: float) -> None:
        """Reports the updates since the last call: mean loss, learning rate, images per second and peak memory."""
        status = f'loss {loss:.4f}, lr {lr:.3g}, {rate:.0f} {self.unit}/s, {memory:.0f} MiB'
        if self.bar:
            self.bar.update(self.task, completed=position, status=status)
        else:
            self.say(f'epoch {self.epoch + 1} update {position}/{self.updates}: {status}')
        values = {'loss': loss, 'lr': lr, f'{self.unit}_per_second': rate, 'memory_mib': memory}
        for log in self.logs:
            log.add('update', values, update)

    def end_epoch(self, history: List[Dict[str, float]]) -> None:
        """Reports the last epoch and writes all of them."""
        if not self.runtime.is_primary:
            return
        row = history[-1]
        scores = [f'{key} {row[key]:.4g}' for key in row if key not in ('epoch', 'updates', 'lr')]
        self.say(f'epoch {row["epoch"]} done: {", ".join(scores)}')
        for log in self.logs:
            log.add('epoch', row, row['epoch'])
        write_csv(self.output / 'epochs.csv', history)

    def finish(self, history: List[Dict[str, float]]) -> None:
        """Draws the curves and names the folder of the results."""
        if self.runtime.is_primary:
            from vmamba.tools.figures.plots import plot_run  # matplotlib: in one process only

            plot_run(history, self.output / 'curves.png')
            self.say(f'done; the results are in {self.output}/')

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
        for log in self.logs:
            log.close()


def _import(name: str) -> Any:
    try:
        return importlib.import_module(LOGS[name])
    except ImportError as error:
        raise UserError(f'log {name} needs the package {name}: pip install {name}; or leave it out of --log') from error
