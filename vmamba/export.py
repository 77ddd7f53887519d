"""Models as files for other runtimes: ONNX, and packages compiled ahead of time (AOTInductor)."""

import re
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Union

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from .kernels import decompositions, use_triton
from .layers.plain import has_global_hooks

__all__ = ['ExportError', 'FeatureMaps', 'OnnxFile', 'capture', 'export_onnx', 'export_pt2']

MIN_OPSET = 18
_ONE_FILE = 2**31 - 2**20  # bytes; ONNX keeps larger weights in a second file
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2}
_SCAN_PROJECTION = re.compile(r'\b(x|dt)_proj[._]weight$')
_INT8_TOLERANCE = 0.2  # finds wrong graphs; how accurate a quantised model is takes a data set to say


class ExportError(ValueError):
    """A model cannot be exported, or the file computes something else than the model."""


class OnnxFile(NamedTuple):
    """Facts about a checked file.

    Attributes:
        nodes: Nodes of its graph.
        size: Bytes, with those of a second file of weights.
        weights: Bytes of the model's parameters and buffers.
        load_s: Seconds in which ONNX Runtime loads it.
        error: Largest difference from PyTorch, relative to the largest output.
    """

    nodes: int
    size: int
    weights: int
    load_s: float
    error: float


class FeatureMaps(nn.Module):
    """The feature maps of a model's stages, as `forward_intermediates` returns them.

    Args:
        model: Model of this library.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> List[Tensor]:
        """[B, C, H, W] -> a map [B, d, H', W'] per stage"""
        return self.model.forward_intermediates(x, intermediates_only=True)


@torch.no_grad()
def capture(model: nn.Module, x: Tensor, dynamic_batch: bool = False, portable: bool = True) -> ExportedProgram:
    """The graph of a model in evaluation mode, for images of one size.

    Args:
        model: Model, or a wrapper such as `FeatureMaps`.
        x: Images [B, C, H, W] of the size to export for.
        dynamic_batch: Whether the graph takes batches of any size.
        portable: Only ordinary operators of PyTorch. Otherwise the library's operators are in the graph, which needs
            `import vmamba` where it runs.

    Raises:
        ExportError: If the model is in training mode or has hooks, which a graph cannot hold.
    """
    _check(model)
    # A batch of 1 would be taken for a constant.
    shapes: Any = ({0: Dim('batch', min=1, max=2**16)},) if dynamic_batch else None
    example = torch.cat([x, x]) if dynamic_batch and x.shape[0] == 1 else x
    if not portable:
        return torch.export.export(model, (example,), dynamic_shapes=shapes)
    with use_triton(False):
        program = torch.export.export(model, (example,), dynamic_shapes=shapes)
        if _fold_complex(folded := program.module()):
            program = torch.export.export(folded, (example,), dynamic_shapes=shapes)
        return program.run_decompositions(decompositions())


def export_onnx(
    model: nn.Module,
    x: Tensor,
    path: Union[str, Path],
    dynamic_batch: bool = False,
    opset: int = MIN_OPSET,
    int8: bool = False,
    metadata: Optional[Mapping[str, str]] = None,
) -> OnnxFile:
    """Writes a model as ONNX, in ordinary operators without loops, once ONNX Runtime computes the same as PyTorch.

    The file has an input `images` and the output `logits`, or `features_0`, `features_1`, ... if the model returns
    several. It is checked by onnx and run by ONNX Runtime on the CPU, whose outputs may differ from the model's by 1e-4
    of the largest (2e-2 in fp16, 0.2 with int8). Otherwise nothing is written.

    Args:
        model: In evaluation mode, on the CPU, in fp32 or fp16.
        x: Images [B, C, H, W] in the model's dtype; the file takes this size, and this batch without `dynamic_batch`.
        path: The .onnx file; weights above 2 GiB are in a second file, PATH.data.
        dynamic_batch: Whether the file takes batches of any size.
        opset: Version of ONNX's operators, at least 18.
        int8: Whether linear layers have int8 weights, with a scale per output channel, and quantise their inputs to
            uint8 as they run. State-space parameters, convolutions and norms keep their precision. Not in fp16.
        metadata: Texts by name that the file holds.

    Raises:
        ExportError: If the opset is not supported, int8 is combined with fp16, model and images are not both in fp32 or
            fp16, the model is in training mode or has hooks, or the file's outputs differ from the model's.
    """
    import onnx
    import onnxscript  # noqa: F401, torch's exporter needs it

    newest = onnx.defs.onnx_opset_version()
    if not MIN_OPSET <= opset <= newest:
        raise ExportError(f'opset must be from {MIN_OPSET} to {newest}, the newest of the installed onnx, got {opset}')
    tolerance = _tolerance(model, x)
    if int8 and x.dtype != torch.float32:
        raise ExportError(f'int8 weights need a model in fp32, got {x.dtype}')
    tolerance = _INT8_TOLERANCE if int8 else tolerance
    program = capture(model, x, dynamic_batch)
    with torch.no_grad():
        number = len(program.graph_signature.user_outputs)
        names = ['logits'] if number == 1 else [f'features_{i}' for i in range(number)]
        written = torch.onnx.export(
            program, dynamo=True, opset_version=opset, input_names=['images'], output_names=names, verbose=False
        )
    for node in written.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, which would be a third of a small file
    quantised = {'onnx.quant.pre_process': 'onnxruntime.quant'} if int8 else {}  # constants are folded already
    written.model.metadata_props.update({**quantised, **(metadata or {})})
    path, weights = Path(path), sum(tensor.nbytes for tensor in model.state_dict().values())
    with tempfile.TemporaryDirectory(dir=path.parent, prefix='.export') as folder:
        file = Path(folder) / path.name
        written.save(file, external_data=weights > _ONE_FILE)
        if int8:
            _quantise(file, model, weights > _ONE_FILE)
        onnx.checker.check_model(str(file), full_check=True)
        session, load_s = _load(file)
        error = max(
            _compare(model, x, lambda images: session.run(None, {'images': images.numpy()}), tolerance)
            for x in _batches(x, dynamic_batch)
        )
        read = onnx.load(file, load_external_data=False)
        found = next(entry.version for entry in read.opset_import if not entry.domain)
        if found != opset:
            raise ExportError(f'torch cannot convert this model to opset {opset}; opset {found} works')
        files = list(Path(folder).iterdir())
        size = sum(file.stat().st_size for file in files)
        for file in sorted(files, reverse=True):  # the weights first
            file.replace(path.parent / file.name)
    return OnnxFile(len(read.graph.node), size, weights, load_s, error)


def export_pt2(
    model: nn.Module, x: Tensor, path: Union[str, Path], dynamic_batch: bool = False, portable: bool = True
) -> float:
    """Writes a model as a package that AOTInductor compiled, once it computes the same as PyTorch.

    `torch._inductor.aoti_load_package(path)` loads it, on the kind of device and processor that it was written on. Its
    images must be contiguous: it misreads others, such as those in channels_last, unless AOTI_RUNTIME_CHECK_INPUTS=1
    is in the environment, which makes them an error.

    Args:
        model: In evaluation mode.
        x: Images [B, C, H, W] on the model's device and in its dtype, of the size that the package takes.
        path: The .pt2 file.
        dynamic_batch: Whether the package takes batches of any size.
        portable: See `capture`.

    Returns:
        Largest difference from PyTorch, relative to the largest output.

    Raises:
        ExportError: If model and images are not both in fp32 or fp16, the model is in training mode or has hooks, or
            the package's outputs differ from the model's.
    """
    tolerance = _tolerance(model, x)
    program, path = capture(model, x, dynamic_batch, portable), Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix='.export') as folder:
        file = Path(folder) / path.name
        torch._inductor.aoti_compile_and_package(program, package_path=str(file))
        package = torch._inductor.aoti_load_package(str(file))
        error = max(
            _compare(model, x, lambda images: _arrays(package(images)), tolerance) for x in _batches(x, dynamic_batch)
        )
        file.replace(path)
    return error


def _quantise(file: Path, model: nn.Module, external: bool) -> None:
    """Quantises the matrices of a file's linear layers in place, except those that project to dt, B and C.

    Graphs keep no names of transposed weights, so these are told by their values.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    projections = [p.detach() for name, p in model.named_parameters() if _SCAN_PROJECTION.search(name)]
    kept = {array.contiguous().numpy().tobytes() for p in projections for array in (p, p.mT)}
    graph = onnx.load(file).graph
    of_scans = {
        tensor.name
        for tensor in graph.initializer
        if len(tensor.dims) != 2 or onnx.numpy_helper.to_array(tensor).tobytes() in kept
    }
    quantize_dynamic(
        file,
        file,
        op_types_to_quantize=['MatMul', 'Gemm'],
        nodes_to_exclude=[node.name for node in graph.node if len(node.input) > 1 and node.input[1] in of_scans],
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=external,
    )


def _load(file: Path) -> Any:
    """A session of ONNX Runtime, and the seconds in which it was made."""
    import onnxruntime

    start = time.perf_counter()
    try:
        session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    except Exception as error:  # onnxruntime's have no common class
        raise ExportError(f'ONNX Runtime {onnxruntime.__version__} does not load the file: {error}') from error
    return session, time.perf_counter() - start


def _batches(x: Tensor, dynamic_batch: bool) -> List[Tensor]:
    return [x, torch.cat([x, x.flip(-1), x.flip(-2)])] if dynamic_batch else [x]


@torch.no_grad()
def _compare(model: nn.Module, x: Tensor, run: Callable[[Tensor], Sequence[np.ndarray]], tolerance: float) -> float:
    """The largest difference of the outputs, relative to the largest of each.

    Raises:
        ExportError: If it is too large.
    """
    largest = 0.0
    for number, (actual, expected) in enumerate(zip(run(x), _arrays(model(x)), strict=True)):
        error = float(np.abs(actual.astype(np.float64) - expected).max() / np.abs(expected).max())
        if not error <= tolerance:  # NaN too
            found = f'output {number} differs from PyTorch by {error:.1e} of its largest value'
            raise ExportError(f'{found}, more than {tolerance:.0e}; no file was written')
        largest = max(largest, error)
    return largest


def _arrays(outputs: Union[Tensor, Sequence[Tensor]]) -> List[np.ndarray]:
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    return [output.double().cpu().numpy() for output in outputs]


def _check(model: nn.Module) -> None:
    if model.training:
        raise ExportError('the model is in training mode; call model.eval() before the export')
    hooks = ('_forward_hooks', '_forward_pre_hooks')
    hooked = [name or 'the model' for name, module in model.named_modules() if any(getattr(module, h) for h in hooks)]
    if hooked or has_global_hooks():
        where = f'{hooked[0]} has' if hooked else 'all modules have'
        raise ExportError(f'{where} hooks, which a graph cannot hold; remove them before the export')


def _tolerance(model: nn.Module, x: Tensor) -> float:
    """The largest difference that is no error in the dtype of model and images."""
    own = next((parameter.dtype for parameter in model.parameters()), x.dtype)
    if x.dtype not in _TOLERANCES or own != x.dtype:
        raise ExportError(f'model and images must both be in fp32 or in fp16, got {own} and {x.dtype}')
    if not len(x):
        raise ExportError(f'the images to compare with PyTorch must be one or more, got shape {tuple(x.shape)}')
    return _TOLERANCES[x.dtype]


def _fold_complex(module: fx.GraphModule) -> bool:
    """Computes what depends on parameters alone through complex numbers, such as the kernels of S4D and H3, and puts
    the results in its place. Returns whether there is any."""
    known: Dict[fx.Node, Any] = {}
    derived = set()  # from complex numbers
    for node in module.graph.nodes:
        if node.op == 'get_attr':
            known[node] = _attribute(module, node.target)
        elif node.op == 'call_function' and all(source in known for source in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.get)
            known[node] = node.target(*args, **kwargs)
            is_complex = isinstance(known[node], Tensor) and known[node].is_complex()
            if is_complex or any(source in derived for source in node.all_input_nodes):
                derived.add(node)
    ends = [
        node for node in derived if isinstance(known[node], Tensor) and any(user not in known for user in node.users)
    ]
    for number, node in enumerate(ends):
        module.register_buffer(f'folded_{number}', known[node])
        with module.graph.inserting_before(node):
            constant = module.graph.get_attr(f'folded_{number}')
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
    for node in reversed(module.graph.nodes):
        if node in known and not node.users:  # assertions too, which eliminate_dead_code() keeps
            module.graph.erase_node(node)
    module.recompile()
    return bool(ends)


def _attribute(module: nn.Module, name: str) -> Any:
    for part in name.split('.'):
        module = getattr(module, part)
    return module
