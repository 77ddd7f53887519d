"""mmdet's region features in fp32, for training in bf16. Importing this imports mmdet."""

from typing import Optional, Tuple

from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmengine.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class Fp32RoIExtractor(SingleRoIExtractor):
    """`SingleRoIExtractor` that computes in fp32 whatever the features' dtype, and has the same arguments.

    The original rounds the boxes to the features' dtype, which in bf16 moves coordinates beyond 512 by up to 2 pixels,
    and mmcv's compiled operator does not take bf16 at all.
    """

    def forward(self, feats: Tuple[Tensor, ...], rois: Tensor, roi_scale_factor: Optional[float] = None) -> Tensor:
        """Maps [B, C, h_i, w_i] and regions [n, 5] (image, x1, y1, x2, y2) -> [n, C, output_size, output_size]"""
        return super().forward(tuple(x.float() for x in feats), rois.float(), roi_scale_factor)
