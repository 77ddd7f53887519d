"""What bench_kernels.py reports: records of the results, as tables, as CSV and in Markdown."""

from dataclasses import dataclass
from math import floor, log10
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import timm
import torch

from vmamba.tools.output_files import write_csv as write_table

from rich.console import Console
from rich.table import Table

from .kernel_cases import REFERENCE_GPU, Case, Reference
from .sections import markdown_table, write_section
from .timing import Ceilings, triton_version

EARLIER = 'peer, H100, measured earlier, not in this run'
TITLES = {
    'scan': 'Selective scan',
    'ss2d': 'SS2D core',
    'model': 'Models at 224x224, bf16 autocast',
    'host': 'Host time of eager training, bf16 autocast',
}
NOTES = """\
Medians of CUDA events; in brackets, of replays of a CUDA graph. Peaks are those of PyTorch's allocator, inputs,
parameters and gradients included. A ratio is the peer's time without graphs over ours without graphs; in brackets, over
ours with, where the backward pass is forward + backward less forward. What peers took earlier was measured with torch
2.11, CUDA 13.0 and mamba_ssm 2.3.2; for models of timm it is the same model."""
KERNEL_NOTES = """\
Times are in milliseconds and bf16. The forward pass runs without gradients; the backward pass is timed alone, again and
again after one forward pass, unless it says "difference" (forward + backward less forward). Inputs that fit the cache
are found there, so that small cases may take less than the floor.

The floor is the time of the fewest bytes at the speed of a copy: forward, inputs read once and the output written once;
backward, inputs and the output's gradient read once and a gradient of each input written once. The forward's share and
rate are of the graph's time where there is one. A state update counts as one exp2."""
HOST_NOTES = """\
Medians of milliseconds on the host's clock, of the forward and of the backward pass apart, each from one
synchronisation of the device to the next. The models take turns of ten passes in one process, so that drift of the
machine hits all alike; the pass before them, after another model's turn, is not counted. The last columns are the
model's time over that of the model beside it in the same run: above 1, the model is slower."""
_KIND_NOTES = {'model': NOTES, 'host': HOST_NOTES}

Record = Dict[str, Any]


@dataclass
class Result:
    """What was measured of a case; status is 'ok', 'OOM' or 'failed', and what was not measured is None."""

    case: Case
    status: str = 'ok'
    message: str = ''
    forward_ms: Optional[float] = None
    forward_graph_ms: Optional[float] = None
    backward_ms: Optional[float] = None
    backward_timed: str = ''
    forward_backward_ms: Optional[float] = None
    forward_backward_graph_ms: Optional[float] = None
    forward_peak_mib: Optional[float] = None
    training_peak_mib: Optional[float] = None


class Run(NamedTuple):
    """Results and the circumstances of all of them."""

    device: str
    ceilings: Ceilings
    repeats: int
    command: str
    results: Sequence[Result]

    @property
    def versions(self) -> str:
        return f'torch {torch.__version__}, triton {triton_version()}'


def over(a: Optional[float], b: Optional[float]) -> Optional[float]:
    """a / b, or None if one is unknown."""
    return a / b if a is not None and b else None


def difference(a: Optional[float], b: Optional[float]) -> Optional[float]:
    """a - b, or None if one is unknown."""
    return None if a is None or b is None else a - b


def records(run: Run) -> List[Record]:
    """A flat dictionary a result, with what follows from it; the columns of the CSV."""
    return [_record(result, run) for result in run.results]


def _record(result: Result, run: Run) -> Record:
    case, ceilings = result.case, run.ceilings
    record = dict(case=case.name, kind=case.kind, implementation=case.implementation, batch=case.batch)
    record['shape'] = case.shape
    record.update((name, value) for name, value in vars(result).items() if name != 'case')
    time = result.forward_graph_ms or result.forward_ms
    for name, nbytes, ms in (
        ('forward', case.forward_bytes(), time),
        ('backward', case.backward_bytes(), result.backward_ms),
    ):
        floor_ms = over(nbytes, ceilings.copy / 1e3)
        record.update({f'{name}_bytes': nbytes, f'{name}_floor_ms': floor_ms})
        record[f'{name}_floor_share'] = over(floor_ms, ms)
    updates = case.updates()
    per_second = over(updates, time and time / 1e3)
    record.update(updates=updates, updates_per_second=per_second, exp2_share=over(per_second, ceilings.exp2))
    is_model = case.kind == 'model'
    ms = result.forward_ms or result.forward_backward_ms
    record['images_per_second'] = over(1e3 * case.batch, ms) if is_model else None
    graph_ms = result.forward_graph_ms or result.forward_backward_graph_ms
    record['graph_images_per_second'] = over(1e3 * case.batch, graph_ms) if is_model else None
    record.update(_peer(result, run))
    record.update(
        repeats=run.repeats,
        device=run.device,
        copy_bytes_per_second=ceilings.copy,
        matmul_flops=ceilings.matmul,
        exp2_per_second=ceilings.exp2,
        torch=torch.__version__,
        triton=triton_version(),
        timm=timm.__version__,
        command=run.command,
    )
    return record


def _peer(result: Result, run: Run) -> Record:
    """The peer's figures, of this run where it ran, and ratios of times taken on the same kind of GPU."""
    case = result.case
    peer = next((other for other in run.results if other.case.is_peer_of(case)), None)
    when = 'this run' if peer else 'earlier'
    reference = peer or case.reference
    comparable = peer is not None or REFERENCE_GPU in run.device
    if peer:
        name = peer.case.model if case.kind == 'host' else peer.case.implementation
    else:
        name = reference.peer if reference else ''
    record = {'peer': name, 'peer_measured': when if name else ''}
    for key in Reference._fields[1:]:
        record[f'peer_{key}'] = getattr(reference, key, None)
    for key in ('forward', 'backward', 'forward_backward'):
        ratio = over(record[f'peer_{key}_ms'], getattr(result, f'{key}_ms'))
        record[f'{key}_ratio'] = ratio if comparable else None
    for key, ms in (
        ('forward', result.forward_graph_ms),
        ('backward', difference(result.forward_backward_graph_ms, result.forward_graph_ms)),
        ('forward_backward', result.forward_backward_graph_ms),
    ):
        record[f'{key}_graph_ratio'] = over(record[f'peer_{key}_ms'], ms) if comparable else None
    ms = record['peer_forward_ms'] or record['peer_forward_backward_ms']
    record['peer_images_per_second'] = over(1e3 * case.batch, ms) if case.kind == 'model' else None
    return record


class Column(NamedTuple):
    header: str
    cell: Callable[[Record], str]


def number(value: Optional[float]) -> str:
    """Three significant digits without exponent, '-' for nothing."""
    if value is None:
        return '-'
    digits = 2 - floor(log10(abs(value))) if value else 0
    return f'{value:.{max(digits, 0)}f}'


def percent(value: Optional[float]) -> str:
    return '-' if value is None else f'{100 * value:.0f} %'


def _text(header: str, key: str) -> Column:
    return Column(header, lambda record: str(record[key]))


def _numbers(header: str, *keys: str, form: Callable[[Optional[float]], str] = number) -> Column:
    return Column(header, lambda record: ' / '.join(form(record[key]) for key in keys))


def _with_graph(header: str, key: str, graph_key: str) -> Column:
    def cell(record: Record) -> str:
        graph = '' if record[graph_key] is None else f' ({number(record[graph_key])})'
        return number(record[key]) + graph

    return Column(header, cell)


def _ratios(*keys: str) -> Column:
    columns = [_with_graph('', f'{key}_ratio', f'{key}_graph_ratio') for key in keys]
    return Column('ratios' if len(keys) > 1 else 'ratio', lambda r: ' / '.join(column.cell(r) for column in columns))


def _backward(record: Record) -> str:
    marks = ' (difference)' if record['backward_timed'] == 'difference' else ''
    return number(record['backward_ms']) + marks


def _status(column: Column) -> Column:
    """Shows what went wrong beside what was measured."""
    return Column(column.header, lambda r: column.cell(r) if r['status'] == 'ok' else f'{column.cell(r)} {r["status"]}')


_CASE = [_text('case', 'case'), _text('by', 'implementation'), _text('batch', 'batch')]
_KERNEL_TIMES = [
    _status(_with_graph('forward', 'forward_ms', 'forward_graph_ms')),
    Column('backward', _backward),
    _with_graph('forward + backward', 'forward_backward_ms', 'forward_backward_graph_ms'),
    _numbers('peak MiB, forward / training', 'forward_peak_mib', 'training_peak_mib'),
]
_LIMITS = [
    _numbers('forward floor, ms', 'forward_floor_ms'),
    _numbers('its share', 'forward_floor_share', form=percent),
    _numbers('backward floor, ms', 'backward_floor_ms'),
    _numbers('its share', 'backward_floor_share', form=percent),
    Column('1e9 state updates/s', lambda record: number(over(record['updates_per_second'], 1e9))),
    _numbers('of exp2 ceiling', 'exp2_share', form=percent),
]
_MODEL_TIMES = [
    _status(_with_graph('images/s', 'images_per_second', 'graph_images_per_second')),
    Column('ms', lambda record: number(record['forward_ms'] or record['forward_backward_ms'])),
    Column('peak MiB', lambda record: number(record['forward_peak_mib'] or record['training_peak_mib'])),
]
_HOST_TIMES = [
    _status(_numbers('forward, ms', 'forward_ms')),
    _numbers('backward, ms', 'backward_ms'),
    _text('beside', 'peer'),
    Column('forward over its', lambda record: number(over(record['forward_ms'], record['peer_forward_ms']))),
    Column('backward over its', lambda record: number(over(record['backward_ms'], record['peer_backward_ms']))),
]


def _peer_columns(kind: str, rows: Sequence[Record]) -> List[Column]:
    earlier = EARLIER
    if kind == 'scan':
        if any(record['peer_measured'] == 'this run' for record in rows):
            earlier = 'mamba_ssm, in this run'
        return [
            _numbers(f'{earlier}: forward / backward', 'peer_forward_ms', 'peer_backward_ms'),
            _ratios('forward', 'backward'),
        ]
    if kind == 'ss2d':
        return [
            _numbers(f'{earlier}: forward / forward + backward', 'peer_forward_ms', 'peer_forward_backward_ms'),
            _numbers('its peak MiB', 'peer_forward_peak_mib', 'peer_training_peak_mib'),
            _ratios('forward', 'forward_backward'),
        ]
    return [
        _text('peer', 'peer'),
        _numbers(f'{earlier}: images/s', 'peer_images_per_second'),
        Column('its peak MiB', lambda r: number(r['peer_forward_peak_mib'] or r['peer_training_peak_mib'])),
        Column('ratio', lambda r: _ratios('forward' if r['forward_ms'] else 'forward_backward').cell(r)),
    ]


def tables_of(kind: str, rows: Sequence[Record]) -> List[List[List[str]]]:
    """Cells of the tables of one kind of cases, each table with its header first."""
    shape = _text('shape', 'shape')
    if kind == 'host':
        layouts = [[*_CASE, shape, *_HOST_TIMES]]
    elif kind == 'model':
        layouts = [[*_CASE, *_MODEL_TIMES, *_peer_columns(kind, rows)]]
    else:
        layouts = [[*_CASE, *_KERNEL_TIMES, *_peer_columns(kind, rows)], [*_CASE, shape, *_LIMITS]]
    return [
        [[column.header for column in columns], *([column.cell(record) for column in columns] for record in rows)]
        for columns in layouts
    ]


def notes_of(kind: str) -> str:
    """How the figures of a kind of cases came about."""
    return _KIND_NOTES.get(kind, f'{NOTES}\n{KERNEL_NOTES}')


def by_kind(run: Run) -> Dict[str, List[Record]]:
    found: Dict[str, List[Record]] = {}
    for record in records(run):
        found.setdefault(record['kind'], []).append(record)
    return found


def write_report(run: Run, console: Console) -> None:
    """Prints the tables, and the messages of what failed."""
    about = f'{run.device}\n{run.versions}, medians of {run.repeats}\nmeasured: {run.ceilings}'
    for kind, rows in by_kind(run).items():
        for i, (header, *cells) in enumerate(tables_of(kind, rows)):
            table = Table(title=f'{TITLES[kind]}\n{about}' if i == 0 else None)
            for j, name in enumerate(header):
                table.add_column(name, justify='left' if j < 2 else 'right', no_wrap=j == 0)
            for row in cells:
                table.add_row(*row)
            console.print(table)
    for notes in dict.fromkeys(map(notes_of, by_kind(run))):
        console.print(notes, highlight=False, markup=False)
    for result in run.results:
        if result.message:
            text = f'{result.case.name} ({result.case.implementation}): {result.status}: {result.message}'
            console.print(text, markup=False)


def write_csv(run: Run, path: Path) -> None:
    """One row a result, with everything needed to tell it from a run elsewhere."""
    rows = records(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(path, [list(rows[0]), *(list(row.values()) for row in rows)])


def write_docs(run: Run, path: Path) -> None:
    """Writes a section for each kind of cases in this run, in the place of its old one; leaves all else as it is."""
    for kind, rows in by_kind(run).items():
        write_section(path, f'bench_kernels {kind}', _section(kind, rows, run))


def _section(kind: str, rows: Sequence[Record], run: Run) -> List[str]:
    about = (
        f'- machine: {run.device}; measured: {run.ceilings}\n'
        f'- versions: {run.versions}, timm {timm.__version__}\n'
        f'- command: `{run.command}`; medians of {run.repeats}'
    )
    parts = [f'## {TITLES[kind]}', about, notes_of(kind)]
    return parts + [markdown_table(cells, left=2) for cells in tables_of(kind, rows)]
