"""A stand-in for mmcv's compiled operators, for an mmcv installed without them.

mmdet imports `mmcv.ops`, which needs the compiled module `mmcv._ext`. If it is missing, `install` registers a module of
that name. Its operators call torchvision or plain PyTorch, on CPU and CUDA; all others raise NotImplementedError.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Callable, List

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

_NAME = 'mmcv._ext'
_AVERAGE = 1  # mmcv's code for the pooling mode
_HARD, _LINEAR, _GAUSSIAN = range(3)  # mmcv's codes for the soft-NMS methods


def install() -> bool:
    """Registers the stand-in as `mmcv._ext` if there is no compiled module; returns whether it is in use."""
    if _NAME not in sys.modules and importlib.util.find_spec(_NAME) is None:
        sys.modules[_NAME] = StandIn()
    return isinstance(sys.modules.get(_NAME), StandIn)


class StandIn(ModuleType):
    """Module with operators under mmcv's names; all others raise NotImplementedError when called."""

    def __init__(self) -> None:
        super().__init__(_NAME, __doc__)
        self.__spec__ = ModuleSpec(_NAME, loader=None)
        for operator in _OPERATORS:
            setattr(self, operator.__name__, operator)

    def __getattr__(self, name: str) -> Callable:
        if name.startswith('__'):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(
                f'the operator {name} needs an mmcv compiled with its operators: '
                f'install a wheel of (onedl-)mmcv that has them, or build it from source with MMCV_WITH_OPS=1'
            )

        return missing


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Non-maximum suppression with mmcv's arguments.

    Args:
        boxes: [n, 4]
        scores: [n]
        iou_threshold: Overlap with a better-scored kept box above which a box is dropped.
        offset: 1 makes widths x2 - x1 + 1, as for boxes in whole pixels.

    Returns:
        Indices of the kept boxes, best first.
    """
    boxes = boxes.float()
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torchvision.ops.nms(boxes, scores.float(), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS: lowers the scores of boxes that overlap better-scored ones instead of dropping them.

    https://arxiv.org/abs/1704.04503

    Args:
        boxes: [n, 4]
        scores: [n]
        dets: [n, 5]; its first rows are overwritten with the kept boxes and their new scores, best first.
        iou_threshold: Overlap at and above which methods 0 and 1 lower scores.
        sigma: Width of method 2's Gaussian.
        min_score: Boxes whose new score is below it are dropped.
        method: Score factor at overlap o: 0 hard (0), 1 linear (1 - o), 2 Gaussian (exp(-o^2 / sigma)).
        offset: As for `nms`.

    Returns:
        Indices of the kept boxes.
    """
    scores, corners = scores.clone(), boxes + boxes.new_tensor([0, 0, offset, offset])
    left = torch.arange(len(boxes), device=boxes.device)
    kept: List[Tensor] = []
    while len(left):
        best = left[scores[left].argmax()]
        dets[len(kept)] = torch.cat([boxes[best], scores[best, None]])
        kept.append(best)
        left = left[left != best]
        overlap = torchvision.ops.box_iou(corners[best, None], corners[left])[0]
        scores[left] *= _soft_factor(overlap, iou_threshold, sigma, method)
        left = left[scores[left] >= min_score]
    return torch.stack(kept) if kept else left


def _soft_factor(overlap: Tensor, iou_threshold: float, sigma: float, method: int) -> Tensor:
    if method == _GAUSSIAN:
        return torch.exp(-overlap.square() / sigma)
    lowered = 1 - overlap if method == _LINEAR else torch.zeros_like(overlap)
    return torch.where(overlap >= iou_threshold, lowered, torch.ones_like(overlap))


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fills output [n, C, h, w] with averages of input [B, C, H, W] over the cells of regions rois [n, 5]."""
    _check_pool_mode(pool_mode)
    output.copy_(
        torch.ops.torchvision.roi_align(
            input.float(), rois.float(), spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
        )
    )


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fills grad_input [B, C, H, W] with the gradient of `roi_align_forward`."""
    _check_pool_mode(pool_mode)
    cells, sampling = (aligned_height, aligned_width), (sampling_ratio, aligned)
    grad = grad_output.float()
    grad_input.copy_(
        torch.ops.torchvision._roi_align_backward(
            grad, rois.float(), spatial_scale, *cells, *grad_input.shape, *sampling
        )
    )


def _check_pool_mode(pool_mode: int) -> None:
    if pool_mode != _AVERAGE:
        raise NotImplementedError("roi_align with pool_mode='max' needs an mmcv compiled with its operators")


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss, https://arxiv.org/abs/1708.02002

    Args:
        input: Logits [n, C].
        target: Labels [n] in 0..C; C is background.
        weight: Factor of a sample by its label [C], or empty.
        output: [n, C], overwritten with the loss.
        gamma: Focusing exponent.
        alpha: Weight of positives.
    """
    output.copy_(_focal_loss(input.float(), target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Fills grad_input [n, C] with the derivative of each loss with respect to its logit."""
    with torch.enable_grad():
        logits = input.detach().float().requires_grad_()
        loss = _focal_loss(logits, target, weight, gamma, alpha).sum()
    grad_input.copy_(torch.autograd.grad(loss, logits)[0])


def _focal_loss(logits: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    classes = logits.shape[1]
    one_hot = F.one_hot(target, classes + 1)[:, :classes].to(logits.dtype)
    loss = torchvision.ops.sigmoid_focal_loss(logits, one_hot, alpha, gamma)
    return loss * F.pad(weight, (0, 1), value=1.0)[target, None] if weight.numel() else loss


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention (https://arxiv.org/abs/2010.04159) with mmcv's plain PyTorch code."""
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Fills the three gradients of `ms_deform_attn_forward`, which is recomputed."""
    inputs = [x.detach().requires_grad_() for x in (value, sampling_locations, attention_weights)]
    with torch.enable_grad():
        value, locations, weights = inputs
        shapes, starts = value_spatial_shapes, value_level_start_index
        output = ms_deform_attn_forward(value, shapes, starts, locations, weights, im2col_step)
    grads = torch.autograd.grad(output, inputs, grad_output)
    for into, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads):
        into.copy_(grad)


def get_compiler_version() -> str:
    """Text for mmcv's environment report."""
    return 'none: torchvision stands in'


def get_compiling_cuda_version() -> str:
    """Text for mmcv's environment report."""
    return 'none: torchvision stands in'


_OPERATORS = (
    nms,
    softnms,
    roi_align_forward,
    roi_align_backward,
    sigmoid_focal_loss_forward,
    sigmoid_focal_loss_backward,
    ms_deform_attn_forward,
    ms_deform_attn_backward,
    get_compiler_version,
    get_compiling_cuda_version,
)
