"""use_triton: what runs where, for how long, and without the package; and launches, on a stand-in for a kernel."""

import os
import subprocess
import sys
from textwrap import dedent
from typing import NamedTuple

import kernel_cases
import oracles
import pytest
import torch
from cases import DEVICE, needs_triton

from vmamba.kernels import _launch, ss2d_scan, use_triton
from vmamba.kernels._launch import Launch, cdiv, next_power_of_2, share_rows

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason='about a computer without a GPU')


def runs(monkeypatch, dtype=torch.float32):
    """Whether a scan launches kernels."""
    launched = []
    with monkeypatch.context() as patched:
        launch = Launch.__call__
        patched.setattr(Launch, '__call__', lambda self, *tensors: (launched.append(self), launch(self, *tensors)))
        ss2d_scan(**kernel_cases.ss2d_scan(batch=1, size=(1, 1), dtype=dtype))
    return bool(launched)


@on_cpu
def test_by_default_a_cpu_runs_plain_pytorch(monkeypatch):
    assert not runs(monkeypatch)
    with use_triton(None):
        assert not runs(monkeypatch)


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('dtype', oracles.DTYPES, ids=str)
def test_by_default_a_gpu_runs_triton_unless_in_doubles(monkeypatch, dtype):
    assert runs(monkeypatch, dtype) == (dtype != torch.float64)


@needs_triton
def test_contexts_nest(monkeypatch):
    with use_triton(True):
        assert runs(monkeypatch)
        with use_triton(False):
            assert not runs(monkeypatch)
        assert runs(monkeypatch)
    with use_triton(False):
        assert not runs(monkeypatch)
        with use_triton(None):
            assert runs(monkeypatch) == (DEVICE == 'cuda')
        assert not runs(monkeypatch)


@needs_triton
@pytest.mark.parametrize('choice', [True, False])
def test_an_exception_ends_the_context(monkeypatch, choice):
    before = runs(monkeypatch)
    with pytest.raises(KeyError), use_triton(choice):
        raise KeyError
    assert runs(monkeypatch) == before


@needs_triton
@pytest.mark.parametrize('forward', [True, False], ids=['triton', 'plain'])
@pytest.mark.parametrize('backward', [None, True, False], ids=['by-default', 'triton', 'plain'])
def test_the_backward_pass_runs_where_the_forward_pass_did(monkeypatch, forward, backward):
    """After its context, and in one that says otherwise."""
    leaves = {k: t.requires_grad_() for k, t in kernel_cases.ss2d_scan(batch=1, size=(1, 1)).items()}
    with use_triton(forward):
        y = ss2d_scan(**leaves)
    launched, launch = [], Launch.__call__
    monkeypatch.setattr(Launch, '__call__', lambda self, *tensors: (launched.append(self), launch(self, *tensors)))
    with use_triton(backward):
        y.sum().backward()
    assert bool(launched) == forward


@needs_triton
def test_the_meta_device_on_triton_is_an_error_and_plain_by_default():
    tensors = {k: t.to('meta') for k, t in kernel_cases.ss2d_scan().items()}
    assert ss2d_scan(**tensors).is_meta
    with use_triton(True), pytest.raises(RuntimeError, match='device meta'):
        ss2d_scan(**tensors)


def run_alone(script, **environment):
    """Runs a script in a process of its own, without the interpreter that these tests have set up."""
    inherited = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'}
    command = [sys.executable, '-c', dedent(script)]
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


RAISES = """
    import torch
    from vmamba.kernels import selective_scan, ss2d_scan, use_triton

    u, A, B = torch.randn(1, 2, 5), -torch.ones(2, 1), torch.randn(1, 1, 5)
    x, x_dbl, parameters = torch.randn(1, 2, 3, 2), torch.randn(1, 2, 3, 4, 3), torch.ones(4, 2)
    ss2d_tensors = x, x_dbl, parameters[..., None], parameters, -parameters[..., None], parameters
    calls = lambda: selective_scan(u, u.abs(), A, B, B), lambda: ss2d_scan(*ss2d_tensors)
    for call in calls:
        assert call().isfinite().all()
        try:
            with use_triton(True):
                call()
        except RuntimeError as error:
            print(error)
        assert call().isfinite().all()
    """


@on_cpu
@pytest.mark.slow
def test_triton_without_a_gpu_is_an_error_that_names_the_interpreter():
    errors = run_alone(RAISES).splitlines()
    assert len(errors) == 2
    assert all('use_triton(True)' in error and 'TRITON_INTERPRET=1' in error and 'cpu' in error for error in errors)


@pytest.mark.slow
def test_without_the_package_everything_runs_plain():
    """Even where the interpreter is asked for."""
    hide = """
    import sys

    sys.modules['triton'] = None
    """
    model = """
    import timm
    import vmamba

    for name in ('vmamba_nano', 'vim_nano'):
        depth = dict(depths=(1,)) if name == 'vmamba_nano' else dict(depth=1)
        model = timm.create_model(name, embed_dim=8, **depth)
        size = model.default_cfg['input_size'][1]
        model(torch.randn(1, model.default_cfg['input_size'][0], size, size)).sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())

    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        calls[1]()
    assert counter.get_total_flops() > 0
    """
    errors = run_alone(dedent(hide) + dedent(RAISES) + dedent(model), TRITON_INTERPRET='1').splitlines()
    assert len(errors) == 2 and all('the package triton' in error for error in errors)


class Kernel:
    """Notes launches that look for the compiled kernel, and those of what they found."""

    def __init__(self, interpreted=False):
        self.interpreted, self.searched, self.launched = interpreted, [], []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.searched.append((grid, arguments, options))
            return None if self.interpreted else self

        return launch

    function, packed_metadata = 'function', 'metadata'

    def run(self, *arguments):
        *grid, stream, function, metadata = arguments[:6]
        assert (stream, function, metadata) == ('stream of -1', 'function', 'metadata')  # the CPU is device -1
        self.launched.append((tuple(grid), arguments[9:]))


class Driver:
    @staticmethod
    def get_current_stream(device):
        return f'stream of {device}'


@pytest.fixture
def kernel(monkeypatch):
    class Triton:
        class runtime:
            class driver:
                active = Driver

    monkeypatch.setattr(_launch, 'triton', Triton)
    return Kernel()


def tensors(dtype=torch.float32):
    return torch.zeros(8, dtype=dtype), None, torch.zeros(8)


def test_the_first_launch_searches_and_the_next_passes_addresses(kernel):
    launch = Launch(kernel, 3, (5, (6, 7)), (True, 'tf32'))
    first, second = tensors(), tensors()
    launch(*first)
    launch(*second)
    assert kernel.searched == [((3, 1, 1), (*first, 5, (6, 7), True, 'tf32'), dict(num_warps=4))]
    addresses = second[0].data_ptr(), 0, second[2].data_ptr()
    assert kernel.launched == [((3, 1, 1), (*addresses, 5, (6, 7), True, 'tf32'))]


@pytest.mark.parametrize(
    'others',
    [tensors(torch.bfloat16), (torch.zeros(8), torch.zeros(8), torch.zeros(8)), (torch.zeros(9)[1:], *tensors()[1:])],
    ids=['another-dtype', 'an-absent-one', 'another-alignment'],
)
def test_tensors_that_need_another_kernel_are_told_apart(kernel, others):
    launch = Launch(kernel, 3, (5,), ())
    for arguments in (tensors(), others, tensors(), others):
        launch(*arguments)
    assert len(kernel.searched) == 2 and len(kernel.launched) == 2


def test_an_interpreter_compiles_nothing(kernel):
    kernel.interpreted = True
    launch = Launch(kernel, 3, (5,), ())
    for _ in range(2):
        launch(*tensors())
    assert len(kernel.searched) == 2


@pytest.mark.parametrize('grid', [0, (3, 0)])
def test_no_programs_are_no_launch(kernel, grid):
    Launch(kernel, grid, (5,), ())(*tensors())
    assert not kernel.searched


def test_options_of_a_launch(kernel):
    Launch(kernel, (3, 2), (5,), (), warps=8, registers=168, stages=1)(*tensors())
    assert kernel.searched[0][::2] == ((3, 2, 1), dict(num_warps=8, maxnreg=168, num_stages=1))


@needs_triton
def test_numbers_of_a_named_tuple_are_constants():
    class Tile(NamedTuple):
        steps: int
        exact: bool

    launch = Launch(Kernel(), 1, (5, (6, 7)), (Tile(16, True), 'tf32'))
    size, sizes, tile, precision = launch.marked_arguments()
    assert (size, sizes, precision) == (5, (6, 7), 'tf32')
    assert isinstance(tile, Tile) and all(isinstance(x, _launch.tl.constexpr) for x in tile) and tile.steps.value == 16


@pytest.mark.parametrize('rows', [0, 1, 15, 16, 17, 100, 1000])
@pytest.mark.parametrize('block_rows', [1, 16])
@pytest.mark.parametrize('most', [1, 7, 400])
def test_shares_cover_all_rows_and_none_is_empty(rows, block_rows, most):
    programs, rows_per_program = share_rows(rows, block_rows, most)
    assert 1 <= programs <= most and rows_per_program % block_rows == 0
    assert programs * rows_per_program >= rows
    assert rows == 0 or (programs - 1) * rows_per_program < rows


@pytest.mark.parametrize('size', range(1, 70))
def test_blocks_that_cover_a_size(size):
    assert cdiv(size, 8) * 8 >= size > (cdiv(size, 8) - 1) * 8
    power = next_power_of_2(size)
    assert power >= size > power // 2 and power & (power - 1) == 0
