"""What a run tells: lines or a progress bar, epochs.csv, TensorBoard and a picture."""

import sys
from pathlib import Path
from typing import Any, Dict, List

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from vmamba.tools.figures.plots import plot_run
from vmamba.tools.output_files import write_csv, writing

from .runtime import Runtime


class Report:
    """Takes what there is to tell, and tells it from the first process only.

    Args:
        output: Folder of the run.
        runtime: Place among the processes.
    """

    def __init__(self, output: Path, runtime: Runtime) -> None:
        self.output, self.runtime = output, runtime
        self.console = Console(quiet=not runtime.is_primary, highlight=False, soft_wrap=True)
        self.writers: Dict[str, Any] = {}
        self.bar = None

    def open_records(self, updates: int, epochs: int) -> None:
        """Begins TensorBoard's records, dropping those from these numbers of updates and epochs on."""
        if not self.runtime.is_primary:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import
        except ImportError:
            self.warn('tensorboard is not installed, so there are no records for it')
        else:
            for name, steps in (('update', updates), ('epoch', epochs)):
                self.writers[name] = SummaryWriter(self.output / 'tensorboard' / name, purge_step=steps + 1)
        if self.console.is_terminal:
            columns = TextColumn('{task.description}'), BarColumn(), TextColumn('{task.fields[status]}')
            self.bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)
            self.task = self.bar.add_task('', status='')
            self.bar.start()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """A line on standard error, from any process."""
        prefix = f'[process {self.runtime.rank}] ' if self.runtime.world > 1 else ''
        print(f'train.py: warning: {prefix}{text}', file=sys.stderr, flush=True)

    def say_status(self, status: str) -> None:
        """What the run is at now; plain lines leave it out."""
        if self.bar:
            self.bar.update(self.task, status=status)

    def start_epoch(self, epoch: int, epochs: int, position: int, updates: int) -> None:
        self.epoch, self.updates = epoch, updates
        if self.bar:
            name = f'epoch {epoch + 1}/{epochs}'
            self.bar.reset(self.task, description=name, total=updates, completed=position, status='')

    def progress(self, update: int, position: int, loss: float, lr: float, rate: float, memory: float) -> None:
        """Tells of the updates since the last time: mean loss, learning rate, images per second and peak memory."""
        if not self.runtime.is_primary:
            return
        status = f'loss {loss:.4f}, lr {lr:.3g}, {rate:.0f} images/s, {memory:.0f} MiB'
        if self.bar:
            self.bar.update(self.task, completed=position, status=status)
        else:
            self.say(f'epoch {self.epoch + 1} update {position}/{self.updates}: {status}')
        values = {'loss': loss, 'lr': lr, 'images_per_second': rate, 'memory_mib': memory}
        self._add_scalars('update', values, update)

    def end_epoch(self, history: List[Dict[str, float]]) -> None:
        """Tells of the last epoch and writes all of them."""
        if not self.runtime.is_primary:
            return
        row = history[-1]
        scores = [f'{key} {row[key]:.4g}' for key in row if key not in ('epoch', 'updates', 'lr')]
        self.say(f'epoch {row["epoch"]} done: {", ".join(scores)}')
        self._add_scalars('epoch', row, row['epoch'])
        write_csv(self.output / 'epochs.csv', [list(row), *([past.get(key) for key in row] for past in history)])

    def finish(self, history: List[Dict[str, float]]) -> None:
        """Draws the curves and names the result."""
        if self.runtime.is_primary:
            plot_run(history, self.output / 'curves.png')
            self.say(f'done; the results are in {self.output}/')
        self.close()

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
        for name, writer in self.writers.items():
            with writing(self.output / 'tensorboard' / name):
                writer.close()

    def _add_scalars(self, name: str, values: Dict[str, float], step: int) -> None:
        if name in self.writers:
            with writing(self.output / 'tensorboard' / name):
                for key, value in values.items():
                    self.writers[name].add_scalar(f'{name}/{key}', value, step)
