"""Comparisons of feature extraction: time and memory by image size, each measured in a process of its own.

Memory is what the forward pass adds: its peak above what is held before it, with the model and the input there. On a
GPU that is what PyTorch's allocator hands out; on a CPU it is the resident memory of the process.
"""

import multiprocessing
import resource
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import pandas as pd
import timm
import torch
from timm.layers import set_fused_attn
from torch import nn

from vmamba.tools.benchmarks.report import Report, versions
from vmamba.tools.benchmarks.timing import MIB, capture, is_out_of_memory, median_ms, peak_mib, settled_memory
from vmamba.tools.devices import autocast, device_name
from vmamba.tools.figures.plots import plot_comparison
from vmamba.tools.output_files import write_csv
from vmamba.tools.terminal import cells_of
from vmamba.tools.user_errors import UserError, nearest
from vmamba.tools.weights import is_of_tokens

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
    'highres_cpu': 'One image on a CPU',
}
NOTES = """\
The forward pass of a batch of random images in inference mode, without classifier. Parameters and images are fp32; bf16
and fp16 are those of autocast. Times are medians, on a GPU of CUDA events, of at most {repeats} passes or {seconds:g} s
and at least 3 passes. The peak is what PyTorch's allocator (on a CPU, the process) takes at most during a pass without
CUDA graph, beyond the model and the images. OOM is out of memory. Attention that is "plain" writes its matrix, "fused"
is PyTorch's `scaled_dot_product_attention`. Of a size that is no multiple of their patches, Vim and DeiT see the part
that whole patches cover (736 of 738 pixels)."""
WARM_UPS = {'cuda': 3, 'cpu': 0}  # beyond the forward whose memory is measured
MIN_REPEATS = 3
_STATUS = Path('/proc/self/status')
_CLEAR_REFS = Path('/proc/self/clear_refs')


@dataclass
class Case:
    """What to measure: a timm model on square images; `:plain` or `:fused` behind its name chooses timm's attention.

    The precision is that of autocast: parameters and images are fp32. The median is of at most `repeats` forwards
    that take these seconds, or of MIN_REPEATS that take longer.
    """

    model: str
    size: int
    batch_size: int = 1
    precision: str = 'fp32'
    device: str = 'cpu'
    repeats: int = 30
    seconds: float = 1.0
    compile: bool = False
    cuda_graph: bool = False

    @property
    def run(self) -> str:
        """How it runs: 'bf16, compiled, CUDA graph'."""
        return ', '.join([self.precision, *['compiled'] * self.compile, *['CUDA graph'] * self.cuda_graph])


@dataclass
class Result:
    """What was measured; status is 'ok', 'OOM', 'timeout' or 'failed', and other than 'ok' leaves numbers empty."""

    status: str
    images_per_second: Optional[float] = None
    ms_per_image: Optional[float] = None
    peak_mib: Optional[float] = None
    device_name: str = ''
    versions: str = versions()
    message: str = ''


def split_name(model: str) -> Tuple[str, str]:
    """The timm name and the attention, which may be '', of a name on the command line.

    Raises:
        UserError: If one of them is unknown.
    """
    name, _, attention = model.partition(':')
    if attention not in ('', 'plain', 'fused'):
        raise UserError(f"attention must be 'plain' or 'fused', got {attention!r}")
    if not timm.is_model(name):
        raise UserError(f'unknown model {name!r}{nearest(name, timm.list_models())}')
    return name, attention


def build_model(name: str, size: int) -> Tuple[nn.Module, int]:
    """A timm model without classifier, for this image size if the model has a fixed one.

    Returns:
        The model and the side of the images to give it: Vim's is that of the whole patches. Convolutions of other
        models leave the rest out, or pad it, themselves.
    """
    name, attention = split_name(name)
    if attention:
        set_fused_attn(attention == 'fused')
    cfg = timm.get_pretrained_cfg(name)
    of_tokens = is_of_tokens(name)
    args = {'img_size': size} if cfg is not None and cfg.fixed_input_size and not of_tokens else {}
    model = timm.create_model(name, num_classes=0, **args).eval()
    if of_tokens:
        size -= (size - model.patch_embed.patch_size) % model.patch_embed.stride
        model.set_input_size(size)
    return model, size


def measure(case: Case) -> Result:
    """Builds the model and measures the memory of a forward, then the time of further ones."""
    device = torch.device(case.device)
    model, side = build_model(case.model, case.size)
    model = model.to(device)
    x = torch.randn(case.batch_size, 3, side, side, device=device)
    run = torch.compile(model) if case.compile else model

    def forward() -> object:
        with autocast(device, case.precision):
            return run(x)

    baseline = settled_memory(device)
    with torch.inference_mode():
        if device.type == 'cuda':
            forward()  # compiles and chooses kernels
        start = time.perf_counter()
        peak = peak_mib(forward, device, baseline) if device.type == 'cuda' else _resident_peak_mib(forward)
        fitting = int(case.seconds / (time.perf_counter() - start))
        repeats = min(case.repeats, max(fitting, MIN_REPEATS))
        if case.cuda_graph:
            forward = capture(forward)
        ms = median_ms(forward, device, repeats, min(WARM_UPS[device.type], fitting)) / case.batch_size
    return Result('ok', 1e3 / ms, ms, peak, device_name(device))


def _resident_peak_mib(forward: Callable[[], object]) -> float:
    """Peak of the resident memory of the process during the forward, above that right before it."""
    try:
        _CLEAR_REFS.write_text('5')  # makes the kernel's own high-water mark start again here
        before = _status_bytes('VmRSS:')
    except OSError:  # not Linux: the mark of the whole process, which is young
        unit = 1 if sys.platform == 'darwin' else 1024
        before = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        forward()
        return (unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / MIB
    forward()
    return (_status_bytes('VmHWM:') - before) / MIB


def _status_bytes(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def result_of(case: Case) -> Result:
    """Measures a case; whatever a model does is a result of the comparison."""
    try:
        return measure(case)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        status = 'OOM' if is_out_of_memory(error) else 'failed'
        return Result(status, device_name=device_name(torch.device(case.device)), message=lines[0])
    finally:
        if case.compile:
            torch.compiler.reset()  # the next size shall not count as a recompilation of this one


def serve(connection: Connection) -> None:
    """Answers each case with its result, until the process is killed or the other end is closed."""
    with suppress(EOFError):
        while True:
            connection.send(result_of(connection.recv()))


class Worker:
    """Measures in a fresh process, which starts with the next case whenever there is none."""

    def __init__(self, timeout: float, target: Callable[[Connection], None] = serve) -> None:
        self.timeout, self.target = timeout, target
        self._process: Optional[multiprocessing.Process] = None

    def measure(self, case: Case) -> Result:
        """Measures a case; a process that dies or takes too long is a result too."""
        if self._process is None:
            # The server has the libraries already, and no GPU, so that fresh processes start at once.
            context = multiprocessing.get_context('forkserver')
            context.set_forkserver_preload([__name__])
            self._connection, end = context.Pipe()
            self._process = context.Process(target=self.target, args=(end,))  # no daemon: compilers start processes
            self._process.start()
            end.close()
        try:
            self._connection.send(case)
            if not self._connection.poll(self.timeout):
                self.stop()
                return Result('timeout', message=f'took more than {self.timeout:g} s')
            result = self._connection.recv()
        except (EOFError, OSError):  # the process has died
            result = self._died()
        if result.status == 'failed':  # an error may leave a GPU's context unusable
            self.stop()
        return result

    def stop(self) -> None:
        """Ends the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None

    def _died(self) -> Result:
        self._process.join()
        code = self._process.exitcode
        self.stop()
        if code == -signal.SIGKILL:
            return Result('OOM', message='killed, as the system does to a process that takes too much memory')
        return Result('failed', message=f'the process ended with exit status {code}')


def compare(cases: Sequence[Case], timeout: float, path: Path, command: str, console: Console) -> pd.DataFrame:
    """Measures the cases one after another; prints a line and writes the CSV file again after each.

    On a GPU one process measures all cases of a model, on a CPU each case has its own. An interrupt ends the comparison
    with what was measured so far, if anything.
    """
    worker, rows = Worker(timeout), []
    try:
        for case in track(cases, 'Comparing', console=console):
            if case.device == 'cpu' or (rows and rows[-1]['model'] != case.model):
                worker.stop()
            rows.append(row_of(case, worker.measure(case), command))
            write_csv(path, rows)
            (cells,) = cells_of(shown(pd.DataFrame(rows[-1:])))
            console.print('  '.join(cells), highlight=False)
    except KeyboardInterrupt:
        if not rows:
            raise
    finally:
        worker.stop()
    return pd.DataFrame(rows)


def row_of(case: Case, result: Result, command: str) -> Dict[str, Any]:
    return {**asdict(case), **asdict(result), 'run': case.run, 'command': command}


def shown(rows: pd.DataFrame) -> pd.DataFrame:
    """The columns of the table; what did not run has its status in the place of the speed."""
    speed = rows.images_per_second.astype(object).where(rows.status == 'ok', rows.status)
    named = {'batch_size': 'batch', 'ms_per_image': 'ms/image', 'peak_mib': 'peak MiB', 'images/s': 'images/s'}
    columns = ['size', 'batch_size', 'run', 'model', 'images/s', 'ms_per_image', 'peak_mib']
    return rows.assign(**{'images/s': speed})[columns].rename(columns=named)


def report_of(rows: pd.DataFrame, name: str, cases: int) -> Report:
    """Models side by side: sorted by how they run, size and batch."""
    runs = rows.run.unique().tolist()
    order = rows.assign(run=rows.run.map(runs.index)).sort_values(['run', 'size', 'batch_size'], kind='stable').index
    facts = {
        'machine': machine_of(rows),
        'versions': rows.versions.iloc[0],
        'command': rows.command.iloc[0],
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
    """Speed and memory against the size, a line for each model and way to run; only the ways that have most sizes."""
    sizes = rows.groupby('run', sort=False)['size'].nunique()
    rows = rows[rows.run.isin(sizes.index[sizes == sizes.max()])]
    single = rows.run.nunique() == 1
    labels = rows.model if single else rows.model + ', ' + rows.run
    title = machine_of(rows) + (f', {rows.run.iloc[0]}' if single else '')
    plot_comparison(rows.assign(label=labels), f'{title}\n{note}'.strip(), path)
