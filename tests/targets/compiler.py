"""Records the kernels that models launch, without running them, and compiles them for GPUs that need not be there."""

import contextlib
import sys
from typing import Any, Dict, NamedTuple

import timm
import torch
import triton
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor

import vmamba  # noqa: F401, registers the models
from vmamba import kernels
from vmamba.kernels import _launch


class Device(NamedTuple):
    """A GPU.

    Args:
        target: What Triton compiles for.
        processors: Its multiprocessors.
        shared_memory: Most bytes of shared memory that a program can have.
    """

    target: GPUTarget
    processors: int
    shared_memory: int


def _nvidia(capability, processors, kilobytes):
    return Device(GPUTarget('cuda', capability, 32), processors, kilobytes * 1024)


def _amd(architecture, warp_size, processors):
    return Device(GPUTarget('hip', architecture, warp_size), processors, 64 * 1024)


DEVICES = {
    'sm_75': _nvidia(75, 40, 64),  # T4
    'sm_80': _nvidia(80, 108, 163),  # A100
    'sm_86': _nvidia(86, 84, 99),  # A40, RTX 3090
    'sm_89': _nvidia(89, 128, 99),  # L40, RTX 4090
    'sm_90': _nvidia(90, 132, 227),  # H100, H200
    'sm_100': _nvidia(100, 148, 227),  # B200
    'sm_120': _nvidia(120, 170, 99),  # RTX 5090
    'gfx942': _amd('gfx942', 64, 304),  # MI300X
    'gfx1100': _amd('gfx1100', 32, 96),  # RX 7900 XTX
}


class Recorded(NamedTuple):
    """A launch, and the dtypes of its tensors."""

    launch: _launch.Launch
    dtypes: tuple

    @property
    def kernel(self):
        return self.launch.kernel.__name__

    @property
    def key(self):
        """What decides what is compiled: of integers only whether they are 1 or multiples of 16."""
        parameters = self.launch.kernel.params[len(self.dtypes) :]
        arguments = [
            argument if parameter.is_constexpr or hasattr(argument, '_fields') else _kind(argument)
            for parameter, argument in zip(parameters, self.launch.arguments)
        ]
        return self.kernel, self.dtypes, str(arguments), str(self.launch.options)


@contextlib.contextmanager
def recording(device, fused=True):
    """Within this context launches are only recorded in a dictionary, as they would be on a device.

    It is for tensors without data, whose device is called 'cpu'.

    Args:
        fused: Whether branches of blocks run as one function.
    """
    launches: Dict[Any, Recorded] = {}

    def record(launch, *tensors):
        if 0 in launch.grid:
            return
        dtypes = tuple(None if tensor is None else tensor.dtype for tensor in tensors)
        recorded = Recorded(launch, dtypes)
        launches.setdefault(recorded.key, recorded)

    nvidia = device.target.backend == 'cuda'
    facts = {
        'runs_on_triton': lambda tensor: True,
        'is_watched': lambda: False,
        'is_nvidia': lambda tensor: nvidia,
        'can_launch_early': lambda tensor: nvidia and device.target.arch >= 90,
        'num_processors': lambda tensor: device.processors,
        'shared_memory': lambda tensor: device.shared_memory,
        'can_run': lambda tensor: fused,
        'can_replace_modules': lambda tensor: fused,
        'is_plain_tensor': lambda x, tensor: True,  # those without data are of a class of their own
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(_attributes(_launch.Launch, {'__call__': record}))
        for name, module in list(sys.modules.items()):
            if name.startswith(kernels.__name__) or name.startswith('vmamba.layers'):
                here = {fact: value for fact, value in facts.items() if hasattr(module, fact)}
                stack.enter_context(_attributes(module, here))
        yield launches


def record_models(device, names, dtypes, batch=64):
    """What models launch in inference and training, by their blocks' fused branches and by their modules."""
    recorded = {}
    for fused in (True, False):
        mode = FakeTensorMode()
        models = [_without_data(timm.create_model(name, drop_path_rate=0.1), mode) for name in names]
        with mode, recording(device, fused) as launches:
            for model in models:
                images = torch.empty(batch, *model.default_cfg['input_size'])
                for dtype in dtypes:
                    with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
                        with torch.no_grad():
                            model.eval()(images)
                        model.train()(images).sum().backward()
        recorded.update(launches)
    return recorded


def record_calls(device, calls):
    """What functions launch."""
    with FakeTensorMode(), recording(device) as launches:
        for call in calls:
            call()
    return launches


def compile_for(device, recorded):
    """Compiles a launch for a device; the bytes of shared memory that a program needs."""
    launch = recorded.launch
    triton.runtime.driver.set_active(_Driver(device))
    tensors = [None if dtype is None else MockTensor(dtype) for dtype in recorded.dtypes]
    compiled = launch.kernel.warmup(*tensors, *launch.marked_arguments(), grid=(1,), **launch.options)
    return compiled.metadata.shared


def _kind(argument):
    if isinstance(argument, tuple):
        return tuple(map(_kind, argument))
    return 1 if argument == 1 else 'multiple of 16' if argument % 16 == 0 else 'integer'


class _Driver:
    """Stands for the driver of a device that is not there."""

    def __init__(self, device):
        self.device = device

    def get_current_target(self):
        return self.device.target

    def get_current_device(self):
        return list(DEVICES.values()).index(self.device)

    def get_current_stream(self, device):
        return 0


def _without_data(model, mode):
    """A model whose tensors have shapes alone, of a mode."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(mode.from_tensor(parameter.detach()))
        for name, buffer in module._buffers.items():
            module._buffers[name] = mode.from_tensor(buffer)
    return model


@contextlib.contextmanager
def _attributes(owner, values):
    """Within this context an owner has other attributes."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)
