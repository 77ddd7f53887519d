"""Registration of differentiable operators: one schema each, for all that PyTorch asks of an operator."""

from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from ._launch import on_device, runs_on_triton

OPERATORS: Dict[str, 'Operator'] = {}


def is_watched() -> bool:
    """Whether calls must go through PyTorch's dispatcher: a trace, a mode or a functorch transform looks at them.

    Otherwise they can bypass it, which saves the host as much time as small kernels take.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return traced or is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active()


def can_replace_modules(x: Tensor) -> bool:
    """Whether kernels may run in place of modules on a map x: on Triton, and nothing is traced, compiled or
    transformed."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.numel() > 0
        and runs_on_triton(x)
        and not is_watched()
        and forward_ad._current_level < 0
    )


class Operator:
    """An operator with a backward pass of its own, differentiable once, registered by one schema.

    It is registered as vmamba::name and vmamba::name_backward, with fakes, autograd and FLOP counts. Called with its
    inputs it returns its results: through the dispatcher where something watches, else directly. `forward` and
    `backward` run it without autograd, for operators that are made of others. Where an operator has two backends, one
    of its inputs chooses.

    Args:
        name: Name of the operator.
        forward: Computes (*results, *saved) from (*inputs, save), annotated. Without `save`, what only the backward
            pass needs may be empty.
        backward: Computes the gradients of the tensor inputs, in their order, from (grads, inputs, saved), where grads
            are those of the results (None for zero). An input that is None, integers or without a gradient gets
            None.
        like: Uninitialised (*results, *saved), from the arguments of `forward`.
        results: How many outputs are results; the others are saved for the backward pass.
        macs: Multiply-adds of the forward pass, from the inputs with shapes in place of tensors.
        backward_macs: The same of the backward pass; 2 * macs by default.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Tuple[Tensor, ...]],
        backward: Callable[[tuple, tuple, tuple], Sequence[Optional[Tensor]]],
        like: Callable[..., Tuple[Tensor, ...]],
        results: int = 1,
        macs: Optional[Callable[..., int]] = None,
        backward_macs: Optional[Callable[..., int]] = None,
    ) -> None:
        self.name, self.results, self.macs = name, results, macs
        self._forward, self._backward, self._like = forward, backward, like
        schema = torch.library.infer_schema(forward, mutates_args=())
        schema, outputs = schema[1:].split(') -> ')
        arguments = schema.split(', ')[:-1]  # without save
        self._inputs, self._outputs = len(arguments), outputs.count('Tensor')
        self._tensors = [i for i, argument in enumerate(arguments) if argument.startswith('Tensor')]
        # PyTorch infers tuples of one tensor as they are written: some versions return them, others the tensor itself.
        schema = f'({schema}) -> ({", ".join(["Tensor"] * self._outputs)})'
        self._op = _register(name, self._run_forward, self._fake_forward, schema)
        schema = self._backward_schema(arguments)
        self._op_backward = _register(f'{name}_backward', self._run_backward, self._fake_backward, schema)
        self._op.register_autograd(self._gradients, setup_context=self._setup_context)
        if macs is not None:
            self._register_flops(macs, backward_macs or (lambda *shapes: 2 * macs(*shapes)))
        OPERATORS[name] = self

    def __call__(self, *inputs: Any) -> Any:
        """The results: a tensor if it is one, else a tuple."""
        save = torch.is_grad_enabled() and any(isinstance(i, Tensor) and i.requires_grad for i in inputs)
        if is_watched() or inputs[0].is_meta:
            outputs = self._op(*inputs, save)
            outputs = (outputs,) if self._outputs == 1 else outputs
        elif save:
            outputs = _Unwatched.apply(self, *inputs)
        else:
            outputs = self.forward(*inputs, save=False)
        return outputs[0] if self.results == 1 else tuple(outputs[: self.results])

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The registered operator, as graphs name it."""
        return getattr(torch.ops.vmamba, self.name).default

    def forward(self, *inputs: Any, save: bool) -> Tuple[Tensor, ...]:
        """(*results, *saved), without autograd."""
        with on_device(inputs[0]):
            return self._forward(*inputs, save)

    def backward(self, grads: tuple, inputs: tuple, saved: tuple) -> Sequence[Optional[Tensor]]:
        """Gradients of the tensor inputs, without autograd."""
        with on_device(inputs[0]):
            return self._backward(grads, inputs, saved)

    def _run_forward(self, *args: Any) -> Any:
        return _one_or_all(self.forward(*args[:-1], save=args[-1]))

    def _fake_forward(self, *args: Any) -> Any:
        return _one_or_all(self._like(*args))

    def _run_backward(self, *args: Any) -> Any:
        """Contiguous gradients in the inputs' dtypes, empty where there is none, each in memory of its own."""
        grads, inputs, saved = self._backward_arguments(args)
        memory = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        outputs = []
        for i, grad in zip(self._tensors, self.backward(grads, inputs, saved)):
            grad = inputs[0].new_empty(0) if grad is None else grad.to(inputs[i].dtype).contiguous()
            if grad.untyped_storage().data_ptr() in memory or grad.storage_offset():
                grad = grad.clone()  # a part of a tensor, such as of sums over several
            memory.add(grad.untyped_storage().data_ptr())
            outputs.append(grad)
        return _one_or_all(outputs)

    def _fake_backward(self, *args: Any) -> Any:
        _, inputs, _ = self._backward_arguments(args)
        return _one_or_all(
            tuple(
                inputs[0].new_empty(0)
                if not _has_gradient(inputs[i])
                else torch.empty_like(inputs[i], memory_format=torch.contiguous_format)
                for i in self._tensors
            )
        )

    def _backward_arguments(self, args: tuple) -> Tuple[tuple, tuple, tuple]:
        """Gradients of the results, inputs, and what is saved."""
        end = self.results + self._inputs
        return args[: self.results], args[self.results : end], args[end:]

    def _backward_schema(self, arguments: Sequence[str]) -> str:
        grads = [f'Tensor? grad_{i}' for i in range(self.results)]
        saved = [f'Tensor saved_{i}' for i in range(self._outputs - self.results)]
        returns = ', '.join(['Tensor'] * len(self._tensors))
        return f'({", ".join([*grads, *arguments, *saved])}) -> ({returns})'

    def _setup_context(self, ctx: Any, inputs: tuple, output: Any) -> None:
        inputs, ctx.save = inputs[:-1], inputs[-1]
        outputs = (output,) if self._outputs == 1 else output
        ctx.others = [None if i in self._tensors else value for i, value in enumerate(inputs)]
        ctx.set_materialize_grads(False)  # zeros for what is saved
        ctx.save_for_backward(*(inputs[i] for i in self._tensors), *outputs[self.results :])

    def _gradients(self, ctx: Any, *grads: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        """Gradients of all inputs and of `save`, through the dispatcher where something watches."""
        if not ctx.save:
            raise RuntimeError(f'{self.name} was called with save=False and has no gradients; call it with save=True')
        gradients = [None] * (self._inputs + 1)
        grads = grads[: self.results]
        if all(grad is None for grad in grads):
            return tuple(gradients)
        tensors = ctx.saved_tensors  # once: under checkpointing each access recomputes them
        inputs, saved = list(ctx.others), tensors[len(self._tensors) :]
        for i, tensor in zip(self._tensors, tensors):
            inputs[i] = tensor
        if is_watched():
            computed = self._op_backward(*grads, *inputs, *saved)
            computed = (computed,) if len(self._tensors) == 1 else computed
        else:
            computed = self.backward(grads, tuple(inputs), saved)
        for i, grad in zip(self._tensors, computed):
            if _has_gradient(inputs[i]):
                gradients[i] = grad
        return tuple(gradients)

    def _register_flops(self, macs: Callable[..., int], backward_macs: Callable[..., int]) -> None:
        def forward_flops(*shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
            return 2 * macs(*shapes[: self._inputs])

        def backward_flops(*shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
            return 2 * backward_macs(*self._backward_arguments(shapes)[1])

        register_flop_formula(getattr(torch.ops.vmamba, self.name))(forward_flops)
        register_flop_formula(getattr(torch.ops.vmamba, f'{self.name}_backward'))(backward_flops)


class _Unwatched(torch.autograd.Function):
    """An operator without the dispatcher.

    The context is set up within the forward pass: PyTorch's way to do it apart inspects signatures at each call.
    """

    @staticmethod
    def forward(ctx: Any, operator: Operator, *inputs: Any) -> Tuple[Tensor, ...]:
        outputs = operator.forward(*inputs, save=True)
        ctx.operator = operator
        operator._setup_context(ctx, (*inputs, True), _one_or_all(outputs))
        return tuple(outputs[: operator.results])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        return None, *ctx.operator._gradients(ctx, *grads)[:-1]


def _register(name: str, function: Callable[..., Any], fake: Callable[..., Any], schema: str) -> Any:
    operator = torch.library.custom_op(f'vmamba::{name}', function, mutates_args=(), schema=schema)
    operator.register_fake(fake)
    return operator


def _has_gradient(tensor: Optional[Tensor]) -> bool:
    return tensor is not None and tensor.is_floating_point()


def _one_or_all(outputs: Sequence[Tensor]) -> Any:
    """Outputs as operators of torch return them."""
    return outputs[0] if len(outputs) == 1 else tuple(outputs)
