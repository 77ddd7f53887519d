"""The launcher, on a stand-in for a kernel that notes how it is launched; no GPU is needed."""

import pytest
import torch

pytest.importorskip('triton')
from vmamba.kernels.fused import launcher  # noqa: E402
from vmamba.kernels.fused.launcher import Launcher  # noqa: E402


class Kernel:
    """Notes launches that look for the compiled kernel, and those of what they found."""

    def __init__(self, interpreted=False):
        self.interpreted, self.searched, self.launched = interpreted, [], []

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.searched.append((grid, arguments, options))
            return None if self.interpreted else self.compiled()

        return launch

    def compiled(self):
        kernel = self

        class Compiled:
            def __getitem__(self, grid):
                return lambda *arguments: kernel.launched.append((grid, arguments))

        return Compiled()


def tensors(dtype=torch.float32):
    return torch.zeros(8, dtype=dtype), None, torch.zeros(8)


def test_the_first_launch_searches_and_the_next_does_not():
    kernel = Kernel()
    launch = Launcher(kernel)
    first, second = tensors(), tensors()
    launch(3, first, (5,), (True, 'tf32'), 4)
    launch(7, second, (5,), (True, 'tf32'), 4)
    assert kernel.searched == [((3, 1, 1), (*first, 5, True, 'tf32'), dict(num_warps=4))]
    assert kernel.launched == [((7, 1, 1), (*second, 5, True, 'tf32'))]


@pytest.mark.parametrize(
    'changed',
    [
        dict(tensors=tensors(torch.bfloat16)),
        dict(tensors=(torch.zeros(8), torch.zeros(8), torch.zeros(8))),
        dict(sizes=(6,)),
        dict(constants=(False,)),
        dict(warps=8),
        dict(registers=168),
        dict(stages=1),
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_a_kernel_depends_on_is_told_apart(changed):
    kernel = Kernel()
    launch = Launcher(kernel)
    arguments = dict(programs=1, tensors=tensors(), sizes=(5,), constants=(True,), warps=4)
    launch(**arguments)
    launch(**{**arguments, **changed})
    assert len(kernel.searched) == 2 and not kernel.launched


def test_of_many_sizes_the_oldest_is_forgotten(monkeypatch):
    monkeypatch.setattr(launcher, '_MAX_REMEMBERED', 3)
    kernel = Kernel()
    launch = Launcher(kernel)
    for size in (1, 2, 3, 4, 4, 3, 2, 1):
        launch(1, tensors(), (size,), (), 4)
    assert [arguments[3] for _, arguments, _ in kernel.searched] == [1, 2, 3, 4, 1]
    assert [arguments[3] for _, arguments in kernel.launched] == [4, 3, 2]


def test_alignment_is_told_apart():
    kernel = Kernel()
    launch = Launcher(kernel)
    unaligned = torch.zeros(9)[1:]
    for first in (unaligned, torch.zeros(8), unaligned):
        launch(1, (first,), (5,), (), 4)
    assert len(kernel.searched) == 2 and len(kernel.launched) == 1


def test_tensors_on_two_devices_are_an_error_that_names_them():
    kernel = Kernel()
    with pytest.raises(RuntimeError, match='cpu and meta'):
        Launcher(kernel)(1, (torch.zeros(8), torch.zeros(8, device='meta')), (), (), warps=1)
    assert not kernel.searched


def test_an_interpreter_compiles_nothing():
    kernel = Kernel(interpreted=True)
    launch = Launcher(kernel)
    for _ in range(2):
        launch(1, tensors(), (5,), (), 4)
    assert len(kernel.searched) == 2


@pytest.mark.parametrize('programs', [0, (3, 0)])
def test_no_programs_are_no_launch(programs):
    kernel = Kernel()
    Launcher(kernel)(programs, tensors(), (5,), (), 4)
    assert not kernel.searched


def test_programs_of_two_axes():
    kernel = Kernel()
    Launcher(kernel)((3, 2), tensors(), (5,), (), 4, stages=1)
    assert kernel.searched[0][::2] == ((3, 2, 1), dict(num_warps=4, num_stages=1))
