"""Measures feature extraction in a process of its own: each line of JSON that it reads is a case, each that it writes a
result.

Memory is what the forward pass adds: its peak above what is held before it, with the model and the input there. On a
GPU that is what PyTorch's allocator hands out; on a CPU it is the process's resident memory.
"""

import json
import os
import resource
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, ContextManager, Optional, Tuple

import timm
import torch
from timm.layers import set_fused_attn
from torch import nn

from vmamba.models.vim import Vim
from vmamba.tools.devices import device_name

import psutil

from .timing import MIB, median_ms, peak_mib, settled_memory, triton_version

WARM_UPS = {'cuda': 3, 'cpu': 0}  # beyond the forward whose memory is measured
MIN_REPEATS = 3
_STATUS = Path('/proc/self/status')
_CLEAR_REFS = Path('/proc/self/clear_refs')


@dataclass
class Case:
    """What to measure.

    Attributes:
        model: timm model name; `:plain` or `:fused` behind it chooses timm's attention.
        size: Side of the square images.
        batch_size: Images a forward.
        dtype: 'float32', or a name of the dtype that autocast lowers to; parameters and images are fp32 anyway.
        device: 'cpu' or 'cuda'.
        repeats: Most forwards of which the median time is taken.
        seconds: Time that these forwards may take, as long as there are MIN_REPEATS.
        compile: Use torch.compile.
        cuda_graph: Replay a CUDA graph.
        memory_limit: Most MiB that the forward may take on a CPU; None for no limit of its own.
    """

    model: str
    size: int
    batch_size: int = 1
    dtype: str = 'float32'
    device: str = 'cpu'
    repeats: int = 30
    seconds: float = 1.0
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
    triton: str = triton_version()
    timm: str = timm.__version__
    message: str = ''


def build_model(name: str, size: int) -> Tuple[nn.Module, int]:
    """A timm model without classifier, for this image size if the model has a fixed one.

    Args:
        name: Model name; `:plain` or `:fused` behind it chooses timm's attention.
        size: Side of the images.

    Returns:
        The model and the side of the images to give it: Vim's is that of the whole patches. Convolutions of other
        models leave the rest out, or pad it, themselves.
    """
    name, _, attention = name.partition(':')
    if attention not in ('', 'plain', 'fused'):
        raise ValueError(f"attention must be 'plain' or 'fused', got {attention!r}")
    if attention:
        set_fused_attn(attention == 'fused')
    cfg = timm.get_pretrained_cfg(name)
    is_vim = timm.models.is_model_in_modules(name, [Vim.__module__.rpartition('.')[2]])  # older timm takes lists alone
    args = {'img_size': size} if cfg is not None and cfg.fixed_input_size and not is_vim else {}
    model = timm.create_model(name, num_classes=0, **args).eval()
    if is_vim:
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
        with _precision(case):
            return run(x)

    if case.memory_limit is not None and device.type == 'cpu':
        _limit_memory(case.memory_limit)
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


def _precision(case: Case) -> ContextManager:
    if case.dtype == 'float32':
        return nullcontext()
    return torch.autocast(case.device, getattr(torch, case.dtype))


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


def _resident_peak_mib(forward: Callable[[], object]) -> float:
    """Peak of the process's resident memory during the forward, above that right before it."""
    before = psutil.Process().memory_info().rss
    try:
        _CLEAR_REFS.write_text('5')  # makes the kernel's own high-water mark start again here
    except OSError:
        return (_sampled_peak(forward) - before) / MIB
    forward()
    return (_high_water_mark() - before) / MIB


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


def main() -> None:
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # what a library prints is no answer
    for line in sys.stdin:
        result = result_of(Case(**json.loads(line)))
        answers.write(json.dumps(asdict(result)) + '\n')
        answers.flush()
    os._exit(0)  # a process short of memory may not survive its own clean-up


if __name__ == '__main__':
    main()
