"""What compare_highres.py reports: CSV, tables, and a section with a picture in Markdown."""

from dataclasses import asdict
from pathlib import Path
from typing import Iterable, List, Sequence, Tuple

from vmamba.tools.figures.plots import plot_comparison
from vmamba.tools.output_files import write_csv

from rich.console import Console
from rich.table import Table

from .kernel_report import number
from .measure import Case, Result
from .sections import markdown_table, write_section

Measurement = Tuple[Case, Result]

TITLES = {
    'highres': 'Feature extraction at rising resolutions',
    'highres_paper': "Feature extraction in the setting of Vim's paper",
    'highres_latency': 'Latency of one image',
}
HEADER = ('size', 'batch', 'run', 'model', 'images/s', 'ms/image', 'peak MiB')
NOTES = """\
The forward pass of a batch of random images in inference mode, without classifier. Parameters and images are fp32; bf16
and fp16 are those of autocast. Times are medians, on a GPU of CUDA events, of at most {repeats} passes or {seconds:g} s
but of 3 at least. The peak is what PyTorch's allocator (on a CPU, the process) takes at most during a pass without CUDA
graph, beyond the model and the images. OOM is out of memory. Attention that is "plain" writes its matrix, "fused" is
PyTorch's `scaled_dot_product_attention`. Of a size that is no multiple of their patches, Vim and DeiT see the part that
whole patches cover (736 of 738 pixels)."""


def run_of(case: Case) -> str:
    """How a case runs: 'bfloat16, compiled, CUDA graph'."""
    modes = ['compiled'] * case.compile + ['CUDA graph'] * case.cuda_graph
    return ', '.join([case.dtype, *modes])


def record(measurements: Iterable[Measurement], path: Path, command: str) -> List[Measurement]:
    """Writes a row of CSV as soon as each case is measured; an interrupt ends it with the rows written so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    recorded, table = [], []
    try:
        for case, result in measurements:
            row = {**asdict(case), **asdict(result), 'command': command}
            table = [*(table or [list(row)]), list(row.values())]
            write_csv(path, table)
            recorded.append((case, result))
    except KeyboardInterrupt:
        if not recorded:
            raise
    return recorded


def cells_of(case: Case, result: Result) -> List[str]:
    """A row of the table."""
    cells = [str(case.size), str(case.batch_size), run_of(case), case.model]
    if result.status != 'ok':
        return [*cells, result.status, '-', '-']
    return [*cells, *map(number, (result.images_per_second, result.ms_per_image, result.peak_mib))]


def by_workload(measurements: Sequence[Measurement]) -> List[Measurement]:
    """Models side by side: sorted by how they run, size and batch, and else as they are."""
    runs = list(dict.fromkeys(run_of(case) for case, _ in measurements))
    return sorted(measurements, key=lambda pair: (runs.index(run_of(pair[0])), pair[0].size, pair[0].batch_size))


def print_report(measurements: Sequence[Measurement], console: Console) -> None:
    """The table, and the messages of what did not run."""
    table = Table(title=f'Feature extraction\n{machine(measurements)}, {versions(measurements)}')
    for name in HEADER:
        is_text = name in ('run', 'model')  # which a narrow terminal folds, so that nothing is cut off
        table.add_column(name, justify='left' if is_text else 'right', overflow='fold', no_wrap=not is_text)
    last = None
    for case, result in by_workload(measurements):
        workload = case.size, case.batch_size, run_of(case)
        if last not in (None, workload):
            table.add_section()
        last = workload
        table.add_row(*cells_of(case, result))
    console.print(table)
    for case, result in measurements:
        if result.message:
            where = f'{case.model} at {case.size}, batch {case.batch_size}, {run_of(case)}'
            console.print(f'{where}: {result.status}: {result.message}', markup=False, highlight=False)


def machine(measurements: Sequence[Measurement]) -> str:
    """The device's name as the first process that lived to tell says it."""
    return next((result.device_name for _, result in measurements if result.device_name), measurements[0][0].device)


def versions(measurements: Sequence[Measurement]) -> str:
    result = measurements[0][1]
    return f'torch {result.torch}, triton {result.triton}, timm {result.timm}'


def write_picture(measurements: Sequence[Measurement], path: Path) -> None:
    """Speed and memory against the size, a line for each model and way to run; only the ways that have most sizes."""
    sizes, series = {}, {}
    for case, result in measurements:
        sizes.setdefault(run_of(case), set()).add(case.size)
        series.setdefault((case.model, run_of(case)), []).append((case, result))
    most = max(map(len, sizes.values()))
    runs = [run for run, found in sizes.items() if len(found) == most]
    lines = {(model, run): rows for (model, run), rows in series.items() if run in runs}
    labelled = {model if len(runs) == 1 else f'{model}, {run}': rows for (model, run), rows in lines.items()}
    title = machine(measurements) + (f', {runs[0]}' if len(runs) == 1 else '')
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_comparison(labelled, title, path)


def write_docs(measurements: Sequence[Measurement], cases: int, path: Path, name: str, command: str) -> None:
    """Writes the section of this name, in the place of its old one, and of several sizes a picture beside the file.

    Args:
        measurements: What was measured.
        cases: How many were asked for: an interrupt leaves some out.
        path: Markdown file.
        name: Key of TITLES.
        command: The command line.
    """
    several_sizes = len({case.size for case, _ in measurements}) > 1
    if several_sizes:
        write_picture(measurements, path.with_name(f'{name}.png'))
    first = measurements[0][0]
    facts = (
        f'- machine: {machine(measurements)}',
        f'- versions: {versions(measurements)}',
        f'- command: `{command}`',
        f'- cases measured: {len(measurements)} of {cases}',
    )
    parts = (
        f'## {TITLES[name]}',
        '\n'.join(facts),
        *([f'![Images per second and peak memory against the size of the image]({name}.png)'] * several_sizes),
        NOTES.format(repeats=first.repeats, seconds=first.seconds),
        markdown_table([HEADER, *(cells_of(*pair) for pair in by_workload(measurements))], left=4),
    )
    write_section(path, f'compare_highres {name}', parts)
