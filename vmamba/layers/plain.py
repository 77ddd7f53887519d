"""Whether kernels may take a module's parameters in place of a call of the module."""

from torch import nn
from torch.nn.modules import module as torch_module


def is_plain(module: nn.Module, kind: type) -> bool:
    """Whether a module is of the class itself and computes as such, and nothing looks at its calls.

    Not plain are modules with hooks, a `forward` of their own (as some libraries put in its place) or parametrised
    weights, whose class is another; modules that are compiled by themselves; and the replicas of DataParallel, which
    have no parameters but plain attributes.
    """
    state = module.__dict__
    hooks = (
        state['_forward_hooks']
        or state['_forward_pre_hooks']
        or state['_backward_hooks']
        or state['_backward_pre_hooks']
    )
    called = 'forward' in state or '_compiled_call_impl' in state or '_is_replica' in state
    return type(module) is kind and not hooks and not called


def has_global_hooks() -> bool:
    """Whether there are hooks of all modules, so that no module is plain."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )
