"""One measurement of feature extraction, in a process of its own: `python measure.py '{"model": ...}'` prints JSON.

Memory is what the forward pass adds: its peak above what is held right before it, with the model and the input there.
On a GPU that is what PyTorch's allocator hands out; on a CPU it is the process's resident memory.
"""

import json
import os
import resource
import statistics
import sys
import threading
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Callable, List, Optional

import psutil
import timm
import torch
from timm.layers import set_fused_attn
from torch import nn

import vmamba  # noqa: F401

MIB = 2**20
WARM_UPS = {'cuda': 3, 'cpu': 0}  # beyond the first forward, whose memory is measured
_STATUS = Path('/proc/self/status')
_CLEAR_REFS = Path('/proc/self/clear_refs')


@dataclass
class Case:
    """What to measure.

    Attributes:
        model: timm model name; `:plain` or `:fused` behind it chooses timm's attention.
        size: Side of the square images.
        batch_size: Images a forward.
        dtype: Name of the dtype of model and images.
        device: 'cpu' or 'cuda'.
        repeats: Forwards of which the median time is taken.
        compile: Use torch.compile.
        cuda_graph: Replay a CUDA graph.
        memory_limit: Most MiB that the forward may take on a CPU; None for no limit of its own.
    """

    model: str
    size: int
    batch_size: int = 1
    dtype: str = 'float32'
    device: str = 'cpu'
    repeats: int = 5
    compile: bool = False
    cuda_graph: bool = False
    memory_limit: Optional[int] = None


@dataclass
class Result:
    """What was measured; status is 'ok', 'OOM', 'timeout' or 'failed', and other than 'ok' leaves numbers empty."""

    status: str
    images_per_second: Optional[float] = None
    ms_per_image: Optional[float] = None
    peak_mib: Optional[float] = None
    device_name: str = ''
    torch: str = torch.__version__
    timm: str = timm.__version__
    message: str = ''


def pick_device(name: Optional[str] = None) -> torch.device:
    """The named device, or the GPU if there is one, else the CPU."""
    return torch.device(name or ('cuda' if torch.cuda.is_available() else 'cpu'))


def device_name(device: torch.device) -> str:
    """Name of the GPU or of the processor."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return f'{names[0] if names else "CPU"}, {torch.get_num_threads()} thread(s)'


def build_model(name: str, size: int) -> nn.Module:
    """A timm model without classifier, for this image size if the model has a fixed one.

    Args:
        name: Model name; `:plain` or `:fused` behind it chooses timm's attention.
        size: Side of the images.
    """
    name, _, attention = name.partition(':')
    if attention not in ('', 'plain', 'fused'):
        raise ValueError(f"attention must be 'plain' or 'fused', got {attention!r}")
    if attention:
        set_fused_attn(attention == 'fused')
    cfg = timm.get_pretrained_cfg(name)
    args = {'img_size': size} if cfg is not None and cfg.fixed_input_size else {}
    return timm.create_model(name, num_classes=0, **args).eval()


def measure(case: Case) -> Result:
    """Builds the model and measures the memory of its first forward, then the time of further ones."""
    device = torch.device(case.device)
    dtype = getattr(torch, case.dtype)
    model = build_model(case.model, case.size).to(device, dtype)
    x = torch.randn(case.batch_size, 3, case.size, case.size, device=device, dtype=dtype)
    run = torch.compile(model) if case.compile else model
    if case.memory_limit is not None and device.type == 'cpu':
        _limit_memory(case.memory_limit)
    forward = partial(run, x)
    with torch.inference_mode():
        peak = _peak_bytes(forward, device)
        if case.cuda_graph:
            forward = capture(forward)
        times = _times(forward, device, case.repeats)
    seconds = statistics.median(times) / case.batch_size
    return Result('ok', 1 / seconds, 1e3 * seconds, peak / MIB, device_name(device))


def _times(forward: Callable[[], object], device: torch.device, repeats: int) -> List[float]:
    for _ in range(WARM_UPS[device.type]):
        forward()
    times = []
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        forward()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def _synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def capture(run: Callable[[], object]) -> Callable[[], object]:
    """A replay, as a CUDA graph, of what `run` does."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> object:
        graph.replay()
        return output

    return replay


def _peak_bytes(forward: Callable[[], object], device: torch.device) -> int:
    """Peak of the memory during the forward above what is held right before it."""
    if device.type == 'cuda':
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward()
        _synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    before = psutil.Process().memory_info().rss
    try:
        _CLEAR_REFS.write_text('5')  # makes the kernel's own high-water mark start again here
    except OSError:
        return _sampled_peak(forward) - before
    forward()
    return _high_water_mark() - before


def _high_water_mark() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith('VmHWM:'))
    return int(line.split()[1]) * 1024


def _sampled_peak(forward: Callable[[], object]) -> int:
    """Largest resident memory that a thread sees, looking every millisecond."""
    process, done, peak = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], process.memory_info().rss)
            done.wait(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        forward()
    finally:
        done.set()
        thread.join()
    return max(peak[0], process.memory_info().rss)


def _limit_memory(mib: int) -> None:
    held = next(line for line in _STATUS.read_text().splitlines() if line.startswith('VmData:'))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(held.split()[1]) * 1024 + mib * MIB, hard))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that there is not enough memory, on a GPU or a CPU."""
    texts = ("can't allocate memory", 'not enough memory', 'bad_alloc')
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in texts)


def main() -> None:
    case = Case(**json.loads(sys.argv[1]))
    try:
        result = measure(case)
    except Exception as error:  # whatever a model does is a result of the comparison
        lines = str(error).splitlines() or [type(error).__name__]
        status = 'OOM' if is_out_of_memory(error) else 'failed'
        result = Result(status, device_name=device_name(torch.device(case.device)), message=lines[0])
    print(json.dumps(asdict(result)), flush=True)
    os._exit(0)  # a process short of memory may not survive its own clean-up


if __name__ == '__main__':
    main()
