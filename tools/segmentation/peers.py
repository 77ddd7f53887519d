"""Networks that U-Mamba is compared with."""

from typing import Sequence

from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import nn

from vmamba.models.umamba import NORM_EPS, SLOPE

BLOCKS = (1, 3, 4, 6, 6, 6, 6, 6, 6, 6)  # of nnU-Net's residual encoders, by stage


def residual_encoder_unet(
    in_chans: int,
    num_classes: int,
    features: Sequence[int],
    kernel_sizes: Sequence[Sequence[int]],
    strides: Sequence[Sequence[int]],
    deep_supervision: bool,
    ndim: int,
) -> ResidualEncoderUNet:
    """nnU-Net's U-Net with a residual encoder, with the stages of a U-Mamba in 2-D or 3-D.

    nnU-Net Revisited, https://arxiv.org/abs/2404.09556
    """
    conv, norm = {2: (nn.Conv2d, nn.InstanceNorm2d), 3: (nn.Conv3d, nn.InstanceNorm3d)}[ndim]
    n = len(features)
    network = ResidualEncoderUNet(
        in_chans,
        n,
        list(features),
        conv,
        list(kernel_sizes),
        list(strides),
        BLOCKS[:n],
        num_classes,
        [1] * (n - 1),
        conv_bias=True,
        norm_op=norm,
        norm_op_kwargs=dict(eps=NORM_EPS, affine=True),
        nonlin=nn.LeakyReLU,
        nonlin_kwargs=dict(negative_slope=SLOPE, inplace=True),
        deep_supervision=deep_supervision,
    )
    return network.apply(InitWeights_He(SLOPE))
