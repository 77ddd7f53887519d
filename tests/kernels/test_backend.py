"""use_triton: what runs where, for how long, and without the package."""

import os
import subprocess
import sys
from textwrap import dedent

import oracles
import pytest
import test_ss2d
import torch
from recorder import Recorder
from test_selective_scan import arguments as scan_arguments
from vmamba.kernels import selective_scan, ss2d_scan, use_triton
from vmamba.kernels.backend import triton

needs_triton = pytest.mark.skipif(triton is None, reason='needs the package triton')
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason='about a computer without a GPU')
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
PLAIN, FUSED = ['ss2d_scan'], ['ss2d_fused']


def ss2d_arguments(dtype=torch.float32, size=(1, 1)):
    return {k: t.to(DEVICE) for k, t in test_ss2d.arguments(size, 1, 3, 1, 1, dtype).items()}


def runs(tensors=None):
    with Recorder() as calls:
        ss2d_scan(**(tensors or ss2d_arguments()))
    return calls.names


@on_cpu
def test_by_default_a_cpu_runs_plain_pytorch():
    assert runs() == PLAIN
    with use_triton(None):
        assert runs() == PLAIN


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('dtype', oracles.DTYPES, ids=str)
def test_by_default_a_gpu_runs_triton_but_for_doubles(dtype):
    assert runs(ss2d_arguments(dtype)) == (PLAIN if dtype == torch.float64 else FUSED)


@needs_triton
def test_contexts_nest():
    with use_triton(True):
        assert runs() == FUSED
        with use_triton(False):
            assert runs() == PLAIN
        assert runs() == FUSED
    with use_triton(False):
        assert runs() == PLAIN
        with use_triton(None):
            assert runs() == (FUSED if DEVICE == 'cuda' else PLAIN)
        assert runs() == PLAIN


@needs_triton
@pytest.mark.parametrize('choice', [True, False])
def test_an_exception_ends_the_context(choice):
    before = runs()
    with pytest.raises(KeyError), use_triton(choice):
        raise KeyError
    assert runs() == before


@needs_triton
@pytest.mark.parametrize('forward', [True, False], ids=['triton', 'plain'])
def test_the_backward_pass_follows_the_forward_pass(forward):
    """After the context, and in one that says otherwise."""
    leaves = {k: t.requires_grad_() for k, t in ss2d_arguments().items()}
    with use_triton(forward):
        y = ss2d_scan(**leaves)
    for context in (use_triton(None), use_triton(not forward)):
        with context, Recorder() as calls:
            y.sum().backward(retain_graph=True)
        assert calls.names == [f'{(FUSED if forward else PLAIN)[0]}_backward']


@needs_triton
@pytest.mark.parametrize(
    'function,tensors',
    [(ss2d_scan, ss2d_arguments(torch.float64)), (selective_scan, scan_arguments(dtype=torch.float64))],
    ids=['ss2d_scan', 'selective_scan'],
)
def test_doubles_on_triton_are_an_error_that_says_so(function, tensors):
    with use_triton(True), pytest.raises(RuntimeError, match='torch.float64'):
        function(**tensors)


@needs_triton
def test_the_meta_device_on_triton_is_an_error_and_plain_by_default():
    tensors = {k: t.to('meta') for k, t in ss2d_arguments().items()}
    assert runs(tensors) == PLAIN
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
def test_triton_without_a_gpu_is_an_error_that_names_the_interpreter():
    errors = run_alone(RAISES).splitlines()
    assert len(errors) == 2
    assert all('use_triton(True)' in error and 'TRITON_INTERPRET=1' in error and 'cpu' in error for error in errors)


def test_without_the_package_everything_runs_plain():
    """Even where the interpreter is asked for."""
    hide = """
    import sys

    sys.modules['triton'] = None
    """
    model = """
    import timm
    import vmamba

    model = timm.create_model('vmamba_nano', depths=(1,), embed_dim=8)
    model(torch.randn(1, 3, 8, 8)).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())

    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        calls[1]()
    assert counter.get_total_flops() > 0
    """
    errors = run_alone(dedent(hide) + dedent(RAISES) + dedent(model), TRITON_INTERPRET='1').splitlines()
    assert len(errors) == 2 and all('the package triton' in error for error in errors)
