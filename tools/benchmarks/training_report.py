"""What compare_training.py reports: CSV, tables, a picture, and a section in Markdown."""

import statistics
from pathlib import Path
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence

import timm
import torch

from vmamba.tools.figures.plots import plot_accuracies
from vmamba.tools.output_files import write_csv

from rich.console import Console
from rich.table import Table

from .run_queue import Result
from .sections import markdown_table, write_section
from .timing import triton_version

NAME = 'training'
SECTION = 'compare_training'
RUNS_HEADER = ('task', 'model', 'seed', 'status', 'epochs', 'accuracy, %', 'minutes')
NOTES = """\
Each model is trained from scratch by `configs/classification/compare.yaml`: {epochs} epochs of AdamW with batches of
{batch_size} and images of {img_size}x{img_size} in {precision}, the same settings for all models and tasks, tuned to
none. A seed decides the weights, the order and the augmentation. Accuracy is that on the validation images after the
last epoch, not after the best one; ± is the standard deviation over the seeds. All runs are listed, also those that
failed. {jobs} runs shared the GPU, so the minutes do not compare the models.
{tasks}

The models of timm are of about the size of ours: `swin` and `convnext` have the four stages of `vmamba_nano`, at
strides 4 to 32 and with 32 to 256 channels, and `vit` has the step between tokens of `vim_nano`, 4 pixels (256 tokens,
and 225 of overlapping patches)."""
TASKS = {
    'mnist5k': '`mnist5k` is 4,000 handwritten digits to learn from and 1,000 to validate on, of 28x28 enlarged.',
    'clutter': '`clutter` is 6,000 digits of random size, place and colour over photographs to learn from, and 1,500\n'
    'of other digits over other photographs to validate on.',
}


class Setting(NamedTuple):
    """What all runs share: the device's name, the command line, their number, how many at once, and some keys."""

    device: str
    command: str
    runs: int
    jobs: int
    epochs: int
    batch_size: int
    img_size: int
    precision: str


def versions() -> str:
    return f'torch {torch.__version__}, triton {triton_version()}, timm {timm.__version__}'


def record(results: Iterable[Result], path: Path, setting: Setting) -> List[Result]:
    """Writes a row of CSV as soon as each run ends; returns them in the order of tasks, models and seeds."""
    recorded, table = [], []
    for result in results:
        row = {**_row(result), **setting._asdict(), 'versions': versions()}
        table = [*(table or [list(row)]), list(row.values())]
        write_csv(path, table)
        recorded.append(result)
    return recorded


def _row(result: Result) -> Dict[str, object]:
    run = result.run
    return dict(
        **run._asdict(),
        parameters_m=result.parameters,
        status=result.status,
        epochs_done=len(result.accuracies),
        accuracy=result.accuracy,
        minutes=round(result.minutes, 2),
        message=result.message,
    )


def ordered(results: Sequence[Result], models: Sequence[str], tasks: Sequence[str]) -> List[Result]:
    """Task after task, in each one model after another, from the first seed to the last."""
    return sorted(results, key=lambda r: (tasks.index(r.run.task), models.index(r.run.model), r.run.seed))


def summary(results: Sequence[Result]) -> List[List[str]]:
    """The table of the models, its header first."""
    tasks = list(dict.fromkeys(result.run.task for result in results))
    rows = [['model', 'built as', 'parameters, M', *tasks]]
    for model in dict.fromkeys(result.run.model for result in results):
        own = [result for result in results if result.run.model == model]
        sizes = [result.parameters for result in own if result.parameters is not None]
        cells = [spread([result for result in own if result.run.task == task]) for task in tasks]
        rows.append([model, _built_as(own[0]), f'{sizes[0]:.2f}' if sizes else '-', *cells])
    return rows


def _built_as(result: Result) -> str:
    args = ', '.join(f'{name}={value}' for name, value in result.run.model_args.items())
    return f'{result.run.timm_name}({args})' if args else result.run.timm_name


def ended(results: Sequence[Result]) -> int:
    """How many runs were not interrupted."""
    return sum(result.status != 'interrupted' for result in results)


def spread(results: Sequence[Result]) -> str:
    """Mean and standard deviation of the runs that came to their end, and how many did not."""
    values = [result.accuracy for result in results if result.accuracy is not None]
    missing = f' ({len(values)} of {len(results)} runs)' if len(values) < len(results) else ''
    if not values:
        return f'-{missing}'
    deviation = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.2f}{deviation}{missing}'


def cells_of(result: Result) -> List[str]:
    """A row of the table of runs."""
    run, accuracy = result.run, result.accuracy
    shown = '-' if accuracy is None else f'{accuracy:.2f}'
    return [
        *(run.task, run.model, str(run.seed), result.status, str(len(result.accuracies))),
        *(shown, f'{result.minutes:.1f}'),
    ]


def explain(result: Result) -> Optional[str]:
    """What went wrong in a run, if anything did."""
    if not result.message:
        return None
    return f'{result.run.model} on {result.run.task}, seed {result.run.seed}: {result.status}: {result.message}'


def print_report(results: Sequence[Result], setting: Setting, console: Console) -> None:
    """Both tables, and the messages of what went wrong."""
    titles = f'Validation accuracy after the last epoch, %\n{setting.device}, {versions()}', 'All runs'
    for title, (header, *rows) in zip(titles, (summary(results), [RUNS_HEADER, *map(cells_of, results)])):
        table = Table(*header, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for message in filter(None, map(explain, results)):
        console.print(message, markup=False, highlight=False)


def write_picture(results: Sequence[Result], path: Path) -> None:
    """Accuracy against epoch, a panel for each task; runs that did not come to their end as far as they came."""
    path.parent.mkdir(parents=True, exist_ok=True)
    curves: Dict[str, Dict[str, List[List[float]]]] = {}
    for result in results:
        curves.setdefault(result.run.task, {}).setdefault(result.run.model, []).append(result.accuracies)
    plot_accuracies(curves, path)


def write_docs(results: Sequence[Result], setting: Setting, path: Path) -> None:
    """Writes the section, in the place of its old one, and the picture beside the file."""
    write_picture(results, path.with_name(f'{NAME}.png'))
    tasks = dict.fromkeys(result.run.task for result in results)
    notes = NOTES.format(**setting._asdict(), tasks='\n'.join(TASKS[task] for task in tasks if task in TASKS))
    messages = '\n'.join(f'- {message}' for message in filter(None, map(explain, results)))
    header, *rows = summary(results)
    facts = (
        f'- machine: {setting.device}',
        f'- versions: {versions()}',
        f'- command: `{setting.command}`',
        f'- runs that came to an end: {ended(results)} of {setting.runs}',
    )
    parts = (
        '## Training from scratch',
        '\n'.join(facts),
        f'![Validation accuracy against epoch]({NAME}.png)',
        notes,
        markdown_table([header, *([row[0], f'`{row[1]}`', *row[2:]] for row in rows)], left=2),
        markdown_table([RUNS_HEADER, *map(cells_of, results)], left=2),
        messages,
    )
    write_section(path, SECTION, [part for part in parts if part])
