"""Normalisation that timm.layers lacks."""

import torch.nn.functional as F
from timm.layers import RmsNorm
from torch import Tensor


class ResidualRmsNorm(RmsNorm):
    """RMSNorm of a residual stream that is kept in fp32: computes in the input's dtype, returns the weight's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)
