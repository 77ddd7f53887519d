"""Median times by the clock of a device, peaks of its memory, CUDA graphs, and what a device reaches at most."""

import gc
import statistics
import time
from typing import Callable, NamedTuple, Optional, Tuple, TypeVar

import torch

try:
    import triton
except ImportError:
    triton = None

MIB = 2**20
WARM_UPS = {'cuda': 5, 'cpu': 1}
T = TypeVar('T')


class Ceilings(NamedTuple):
    """What a device reaches, measured: bytes per second read and written by a copy, and FLOP/s of a bf16 product."""

    copy: float
    matmul: float

    def __str__(self) -> str:
        return f'copy {self.copy / 1e12:.3g} TB/s, bf16 matrix product {self.matmul / 1e12:.3g} TFLOP/s'


def triton_version() -> str:
    return 'none' if triton is None else triton.__version__


def median_ms(run: Callable[[], object], device: torch.device, repeats: int, warm_ups: Optional[int] = None) -> float:
    """Median milliseconds of a run after some warm-up; on a GPU by events, without waiting between the runs."""
    for _ in range(WARM_UPS[device.type] if warm_ups is None else warm_ups):
        run()
    if device.type != 'cuda':
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in events)


def wall_ms(run: Callable[[], T], device: torch.device) -> Tuple[float, T]:
    """Milliseconds that a run takes on the host's clock, until the device is done with it, and what it returns."""
    _synchronize(device)
    start = time.perf_counter()
    out = run()
    _synchronize(device)
    return 1e3 * (time.perf_counter() - start), out


def _synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def settled_memory(device: torch.device) -> int:
    """Bytes that stay allocated after all garbage is gone, cuBLAS's workspaces included; 0 on a CPU."""
    gc.collect()
    if device.type != 'cuda':
        return 0
    torch.cuda.empty_cache()
    x = torch.ones(16, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
    (x @ x).sum().backward()  # there is a workspace for the backward pass's thread, too
    del x
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that there is not enough memory, on a GPU or a CPU."""
    texts = ("can't allocate memory", 'not enough memory', 'bad_alloc')
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(text in str(error) for text in texts)


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


def peak_mib(run: Callable[[], object], device: torch.device, baseline: int) -> Optional[float]:
    """Peak of the memory that PyTorch's allocator hands out during a run, above a baseline; None on a CPU."""
    if device.type != 'cuda':
        run()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - baseline) / MIB


def median_and_peak(
    run: Callable[[], object], device: torch.device, repeats: int, baseline: int, warm_ups: int
) -> Tuple[float, Optional[float]]:
    """Median milliseconds of a run and the peak of its memory in MiB, after some warm-up."""
    for _ in range(warm_ups):
        run()
    peak = peak_mib(run, device, baseline)
    return median_ms(run, device, repeats, 0), peak


def measure_ceilings(device: torch.device, repeats: int) -> Ceilings:
    """Measures on tensors that fill a GPU, or on small ones on a CPU."""
    on_gpu = device.type == 'cuda'
    source = torch.zeros((512 if on_gpu else 16) * MIB, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source), device, repeats)
    size = 8192 if on_gpu else 256
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    matmul_ms = median_ms(lambda: matrix @ matrix, device, repeats)
    return Ceilings(2e3 * source.nbytes / copy_ms, 2e3 * size**3 / matmul_ms)
