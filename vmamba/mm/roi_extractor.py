"""mmdet's RoI extractor in fp32, for training in bf16. Importing this module imports mmdet."""

from typing import Optional, Tuple

from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmengine.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class Fp32RoIExtractor(SingleRoIExtractor):
    """`SingleRoIExtractor` that always computes in fp32; the arguments are the same.

    The original rounds boxes to the features' dtype: in bf16, coordinates above 512 move by up to 2 pixels. mmcv's
    compiled operator does not support bf16.
    """

    def forward(self, feats: Tuple[Tensor, ...], rois: Tensor, roi_scale_factor: Optional[float] = None) -> Tensor:
        """Maps [B, C, h_i, w_i] and regions [n, 5] (image, x1, y1, x2, y2) -> [n, C, output_size, output_size]"""
        return super().forward(tuple(x.float() for x in feats), rois.float(), roi_scale_factor)
