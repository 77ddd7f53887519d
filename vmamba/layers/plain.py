"""Whether kernels may take a module's parameters in place of a call of the module."""

from torch import nn
from torch.nn.modules import module as torch_module

_HOOKS = '_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks'


def is_plain(module: nn.Module, kind: type) -> bool:
    """Whether a module is of the class itself and computes as such, and nothing looks at its calls.

    Not plain are modules with hooks, a `forward` of their own (as some libraries put in its place) or parametrised
    weights, whose class is another.
    """
    if type(module) is not kind:
        return False
    state = module.__dict__
    return 'forward' not in state and not any(state[name] for name in _HOOKS)


def has_global_hooks() -> bool:
    """Whether there are hooks of all modules, so that no module is plain."""
    return any(getattr(torch_module, f'_global{name}') for name in _HOOKS)
