"""Comparisons of feature extraction: the cases one after another, their CSV file, table and picture."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Iterable, Iterator, List, Optional, Sequence, Tuple

import pandas as pd

from vmamba.tools.benchmarks.highres import Case, Result, Worker
from vmamba.tools.benchmarks.report import Report
from vmamba.tools.figures.plots import plot_comparison
from vmamba.tools.output_files import write_csv
from vmamba.tools.terminal import cells_of

from rich.console import Console
from rich.progress import track

MODELS = (
    'vmamba_t',
    'vim_t',
    'vim2_t',
    'mambavision_t',
    'vssd_t',
    'deit_tiny_patch16_224:plain',
    'deit_tiny_patch16_224:fused',
    'swin_tiny_patch4_window7_224',
    'convnext_tiny',
)
TITLES = {
    'highres': 'Feature extraction at rising resolutions',
    'highres_paper': "Feature extraction in the setting of Vim's paper",
    'highres_latency': 'Latency of one image',
}
NOTES = """\
The forward pass of a batch of random images in inference mode, without classifier. Parameters and images are fp32; bf16
and fp16 are those of autocast. Times are medians, on a GPU of CUDA events, of at most {repeats} passes or {seconds:g} s
and at least 3 passes. The peak is what PyTorch's allocator (on a CPU, the process) takes at most during a pass without
CUDA graph, beyond the model and the images. OOM is out of memory. Attention that is "plain" writes its matrix, "fused"
is PyTorch's `scaled_dot_product_attention`. Of a size that is no multiple of their patches, Vim and DeiT see the part
that whole patches cover (736 of 738 pixels)."""
Measurement = Tuple[Case, Result]


def compare(cases: Sequence[Case], timeout: float, console: Console) -> Iterator[Measurement]:
    """Measures the cases one after another and prints a line for each, under a progress bar."""
    worker = Worker(timeout)
    measured: List[Measurement] = []
    try:
        for case in track(cases, description='Comparing', console=console):
            if case.device == 'cpu' or (measured and measured[-1][0].model != case.model):
                worker.stop()
            measured.append((case, known_out_of_memory(case, measured) or worker.measure(case)))
            (cells,) = cells_of(shown(frame_of(measured[-1:])))
            console.print('  '.join(cells), highlight=False)
            yield measured[-1]
    finally:
        worker.stop()


def known_out_of_memory(case: Case, measured: Sequence[Measurement]) -> Optional[Result]:
    """OOM without a trial, if the same ran out of memory with images no larger and no more pixels in all."""
    for other, result in measured:
        same = replace(other, size=case.size, batch_size=case.batch_size) == case
        smaller = other.size <= case.size and other.batch_size * other.size**2 <= case.batch_size * case.size**2
        if result.status == 'OOM' and same and smaller:
            return replace(result, message=f'not tried: OOM at {other.size}, batch {other.batch_size}')
    return None


def frame_of(measurements: Iterable[Measurement]) -> pd.DataFrame:
    """A row for each measurement; `run` is how it ran: 'bfloat16, compiled, CUDA graph'."""
    return pd.DataFrame(
        {
            **asdict(case),
            **asdict(result),
            'run': ', '.join([case.dtype, *['compiled'] * case.compile, *['CUDA graph'] * case.cuda_graph]),
        }
        for case, result in measurements
    )


def record(measurements: Iterable[Measurement], path: Path, command: str) -> pd.DataFrame:
    """Writes the CSV file again after each case; an interrupt ends it with what was measured so far, if anything."""
    recorded: List[Measurement] = []
    try:
        for measurement in measurements:
            recorded.append(measurement)
            write_csv(path, frame_of(recorded).assign(command=command).to_dict('records'))
    except KeyboardInterrupt:
        if not recorded:
            raise
    return frame_of(recorded)


def shown(rows: pd.DataFrame) -> pd.DataFrame:
    """The columns of the table; what did not run has its status in the place of the speed."""
    speed = rows.images_per_second.astype(object).where(rows.status == 'ok', rows.status)
    named = {'batch_size': 'batch', 'ms_per_image': 'ms/image', 'peak_mib': 'peak MiB', 'images/s': 'images/s'}
    columns = ['size', 'batch_size', 'run', 'model', 'images/s', 'ms_per_image', 'peak_mib']
    return rows.assign(**{'images/s': speed})[columns].rename(columns=named)


def report_of(rows: pd.DataFrame, name: str, command: str, cases: int) -> Report:
    """Models side by side: sorted by how they run, size and batch."""
    runs = rows.run.unique().tolist()
    order = rows.assign(run=rows.run.map(runs.index)).sort_values(['run', 'size', 'batch_size'], kind='stable').index
    facts = {
        'machine': machine_of(rows),
        'versions': rows.versions.iloc[0],
        'command': command,
        'cases measured': f'{len(rows)} of {cases}',
    }
    messages = [
        f'{row.model} at {row.size}, batch {row.batch_size}, {row.run}: {row.status}: {row.message}'
        for row in rows[rows.message != ''].itertuples()
    ]
    return Report(
        f'compare_highres {name}',
        TITLES[name],
        facts,
        [shown(rows.loc[order])],
        NOTES.format(repeats=rows.repeats.iloc[0], seconds=rows.seconds.iloc[0]),
        messages,
        f'{name}.png' if rows['size'].nunique() > 1 else '',
    )


def machine_of(rows: pd.DataFrame) -> str:
    """Name of the device, as the first process that measured anything gives it."""
    return next(filter(None, rows.device_name), rows.device.iloc[0])


def write_picture(rows: pd.DataFrame, path: Path, note: str = '') -> None:
    """Speed and memory against the size, a line for each model and way to run; only the ways that have most sizes.

    Args:
        rows: Of `record`.
        path: Of the picture.
        note: What to see, for the title.
    """
    sizes = rows.groupby('run', sort=False)['size'].nunique()
    rows = rows[rows.run.isin(sizes.index[sizes == sizes.max()])]
    single = rows.run.nunique() == 1
    labels = rows.model if single else rows.model + ', ' + rows.run
    title = machine_of(rows) + (f', {rows.run.iloc[0]}' if single else '')
    plot_comparison(rows.assign(label=labels), f'{title}\n{note}'.strip(), path)
