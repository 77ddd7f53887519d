"""The stand-in for mmcv's compiled operators against definitions written out plainly."""

import importlib.util
import math
import runpy
import subprocess
import sys

import mmcv
import pytest
import torch

import vmamba.mm  # noqa: F401  installs the stand-in
from vmamba.mm import ops

if not ops.install():
    pytest.skip('mmcv has its compiled operators', allow_module_level=True)

from mmcv.ops import batched_nms, nms, roi_align, soft_nms  # noqa: E402

HAS_GPU = torch.cuda.is_available()
GPU_MARKS = pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason='needs a CUDA device')


@pytest.fixture(params=['cpu', pytest.param('cuda', marks=GPU_MARKS)])
def device(request):
    return request.param


def boxes_and_scores(device, n=60):
    corners = torch.rand(n, 2) * 20
    boxes = torch.cat([corners, corners + 12 + torch.rand(n, 2) * 5], dim=1)
    return boxes.to(device), torch.rand(n).to(device)


def overlap(a, b, offset):
    """Intersection over union of two boxes."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + offset)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + offset)
    area = [(box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b)]
    return width * height / (sum(area) - width * height)


def plain_nms(boxes, scores, threshold, offset=0):
    kept = []
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        if all(overlap(boxes[i], boxes[j], offset) <= threshold for j in kept):
            kept.append(i)
    return kept


def plain_soft_nms(boxes, scores, threshold, sigma, min_score, method):
    left, kept = dict(enumerate(scores)), []
    while left:
        best = max(left, key=left.get)
        kept.append((best, left.pop(best)))
        for i in list(left):
            o = overlap(boxes[best], boxes[i], 0)
            if method == 'gaussian':
                left[i] *= math.exp(-(o**2) / sigma)
            elif o >= threshold:
                left[i] *= 1 - o if method == 'linear' else 0
            if left[i] < min_score:
                del left[i]
    return kept


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold', [0.1, 0.3, 0.7])
def test_nms(threshold, offset, device):
    boxes, scores = boxes_and_scores(device)
    dets, kept = nms(boxes, scores, threshold, offset)
    assert kept.tolist() == plain_nms(boxes.tolist(), scores.tolist(), threshold, offset)
    assert torch.equal(dets, torch.cat([boxes, scores[:, None]], dim=1)[kept])
    assert 1 < len(kept) < len(boxes)


def test_the_offset_decides():
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 2, 4, 6]])  # overlap 8 / 24 without, 15 / 35 with an offset of 1
    assert len(nms(boxes, torch.tensor([0.9, 0.8]), 0.4, offset=0)[1]) == 2
    assert len(nms(boxes, torch.tensor([0.9, 0.8]), 0.4, offset=1)[1]) == 1


def test_nms_of_no_boxes(device):
    dets, kept = nms(torch.zeros(0, 4, device=device), torch.zeros(0, device=device), 0.5)
    assert dets.shape == (0, 5) and kept.shape == (0,)


def test_nms_in_bf16_is_that_of_the_rounded_boxes(device):
    boxes, scores = (x.bfloat16() for x in boxes_and_scores(device))
    assert torch.equal(nms(boxes, scores, 0.4)[1], nms(boxes.float(), scores.float(), 0.4)[1])


@pytest.mark.parametrize('split_thr', [10, 1000])
def test_batched_nms_keeps_classes_apart(split_thr, device):
    boxes, scores = boxes_and_scores(device)
    classes = torch.arange(len(boxes), device=device) % 3
    dets, kept = batched_nms(boxes, scores, classes, dict(type='nms', iou_threshold=0.3, split_thr=split_thr))
    expected = []
    for label in range(3):
        of_class = (classes == label).nonzero()[:, 0].tolist()
        expected += [of_class[i] for i in plain_nms(boxes[of_class].tolist(), scores[of_class].tolist(), 0.3)]
    assert kept.tolist() == sorted(expected, key=lambda i: -scores[i])
    assert torch.equal(dets[:, :4], boxes[kept])


@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
@pytest.mark.parametrize('min_score', [1e-3, 0.2])
def test_soft_nms(method, min_score, device):
    boxes, scores = boxes_and_scores(device)
    dets, kept = soft_nms(boxes, scores, 0.3, 0.5, min_score, method)
    expected = plain_soft_nms(boxes.tolist(), scores.tolist(), 0.3, 0.5, min_score, method)
    assert kept.tolist() == [i for i, _ in expected]
    torch.testing.assert_close(dets[:, 4], torch.tensor([score for _, score in expected], device=device))
    torch.testing.assert_close(dets[:, :4], boxes[kept])
    assert len(kept) < len(boxes)


def test_soft_nms_of_no_boxes(device):
    dets, kept = soft_nms(torch.zeros(0, 4, device=device), torch.zeros(0, device=device))
    assert dets.shape == (0, 5) and kept.shape == (0,)


def plain_roi_align(x, rois, size, scale, sampling, aligned):
    """Averages bilinear samples, one by one."""
    rows = []
    for image, *box in rois.tolist():
        x1, y1, x2, y2 = (c * scale - (0.5 if aligned else 0) for c in box)
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = max(width, 1), max(height, 1)
        nx = sampling or math.ceil(width / size)
        ny = sampling or math.ceil(height / size)
        for i in range(size):
            for j in range(size):
                samples = [
                    bilinear(
                        x[int(image)],
                        y1 + height / size * (i + (a + 0.5) / ny),
                        x1 + width / size * (j + (b + 0.5) / nx),
                    )
                    for a in range(ny)
                    for b in range(nx)
                ]
                rows.append(torch.stack(samples).mean(0))
    return torch.stack(rows).unflatten(0, (-1, size, size)).permute(0, 3, 1, 2)


def bilinear(x, row, col):
    height, width = x.shape[1:]
    if row < -1 or row > height or col < -1 or col > width:
        return x[:, 0, 0] * 0
    row, col = min(max(row, 0), height - 1), min(max(col, 0), width - 1)
    top, left = int(row), int(col)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    row, col = row - top, col - left
    upper = x[:, top, left] * (1 - col) + x[:, top, right] * col
    return upper * (1 - row) + (x[:, bottom, left] * (1 - col) + x[:, bottom, right] * col) * row


ROIS = torch.tensor([[0, 2.0, 3, 17, 21], [1, -3.0, 0, 9, 30], [1, 5.5, 6.25, 6, 7]])


@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('sampling', [0, 2])
def test_roi_align_and_its_gradient(sampling, aligned, device):
    x, weights, rois = (t.to(device) for t in (torch.randn(2, 3, 11, 13), torch.randn(3, 3, 4, 4), ROIS))
    results = []
    for function in (roi_align, plain_roi_align):
        leaf = x.clone().requires_grad_()
        args = (4, 0.5, sampling, 'avg', aligned) if function is roi_align else (4, 0.5, sampling, aligned)
        out = function(leaf, rois, *args)
        (out * weights).sum().backward()
        results.append((out.detach(), leaf.grad))
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert results[0][1].count_nonzero() > 20


def test_roi_align_in_bf16(device):
    x, rois = torch.randn(2, 3, 11, 13, device=device).bfloat16().requires_grad_(), ROIS.to(device).bfloat16()
    out = roi_align(x, rois, 4, 0.5, 2, 'avg', True)
    out.float().square().sum().backward()
    expected = roi_align(x.detach().float(), rois.float(), 4, 0.5, 2, 'avg', True)
    assert out.dtype == x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.01, atol=0.01)


def test_roi_align_by_maximum_is_refused():
    with pytest.raises(NotImplementedError, match='max'):
        roi_align(torch.randn(2, 3, 8, 8), ROIS, 4, 0.5, 2, 'max', True)


@pytest.mark.parametrize('weighted', [False, True])
def test_sigmoid_focal_loss(weighted, device):
    from mmcv.ops import sigmoid_focal_loss

    logits = torch.randn(6, 3).to(device).requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 3, 1], device=device)  # 3 is background
    weights = torch.tensor([0.5, 2.0, 3.0, 1.0], device=device)
    weight = weights[:3] if weighted else None
    p, y = logits.sigmoid(), torch.eye(4, device=device)[target, :3]
    p_t, alpha_t = p * y + (1 - p) * (1 - y), 0.25 * y + 0.75 * (1 - y)
    expected = -alpha_t * (1 - p_t) ** 2 * p_t.log()
    if weighted:
        expected = expected * weights[target, None]
    loss = sigmoid_focal_loss(logits, target, 2.0, 0.25, weight, 'sum')
    torch.testing.assert_close(loss, expected.sum())
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), logits)[0] for x in (loss, expected)))


def test_deformable_attention_has_the_gradients_of_the_plain_version(device):
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch

    shapes, starts = torch.tensor([[4, 5], [2, 3]], device=device), torch.tensor([0, 20], device=device)
    inputs = [torch.randn(2, 26, 2, 4), torch.rand(2, 3, 2, 2, 2, 2), torch.rand(2, 3, 2, 2, 2)]
    inputs = [x.to(device).requires_grad_() for x in inputs]
    value, locations, weights = inputs
    actual = MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)
    expected = multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out in (actual, expected)]
    for grad, reference in zip(*grads):
        assert grad.count_nonzero()
        torch.testing.assert_close(grad, reference)


def test_other_operators_name_themselves_and_the_way_out():
    from mmcv.ops import deform_conv2d, nms_rotated

    with pytest.raises(NotImplementedError, match='deform_conv_forward needs an mmcv compiled .*MMCV_WITH_OPS=1'):
        deform_conv2d(torch.randn(1, 2, 4, 4), torch.randn(1, 18, 4, 4), torch.randn(2, 2, 3, 3), 1, 1)
    with pytest.raises(NotImplementedError, match='nms_rotated needs'):
        nms_rotated(torch.rand(2, 5), torch.rand(2), 0.5)


def test_a_real_build_is_used(monkeypatch, tmp_path):
    (tmp_path / '_ext.py').write_text('compiled = True\n')
    monkeypatch.setattr(mmcv, '__path__', [*mmcv.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, 'mmcv._ext')
    importlib.invalidate_caches()
    assert not ops.install()
    assert importlib.import_module('mmcv._ext').compiled


def test_installing_again_keeps_the_stand_in():
    before = sys.modules['mmcv._ext']
    assert ops.install() and sys.modules['mmcv._ext'] is before


def test_the_report_of_the_environment_says_so():
    from mmcv.ops import get_compiler_version

    assert 'torchvision' in get_compiler_version()


def test_mmdet_works_imported_before():
    """The other order is that of all tests here."""
    script = """
import mmdet, vmamba.mm
import mmcv.ops
from mmengine.registry import MODELS
assert MODELS.get('VMambaBackbone') is vmamba.mm.VMambaBackbone
"""
    subprocess.run([sys.executable, '-c', script], check=True, capture_output=True, timeout=120)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmcv', None)
    with pytest.raises(ModuleNotFoundError, match=r"vmamba.mm needs mmcv: pip install 'vmamba\[mm\]'"):
        runpy.run_path(vmamba.mm.__file__)
