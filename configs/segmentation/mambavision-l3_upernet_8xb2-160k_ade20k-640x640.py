"""UPerNet with MambaVision-L3, pretrained on ImageNet-21K, with crops of 640 x 640; in fp32, since AMP is unstable.

The backbone's weights are licensed CC-BY-NC-SA-4.0, for non-commercial use.
"""

_base_ = './vmamba-s_upernet_8xb2-amp-160k_ade20k-640x640.py'

model = dict(
    backbone=dict(
        variant='mambavision_l3.in21k_ft_in1k_512',
        drop_path_rate=0.2,  # see _base_/upernet_mambavision.py
        model_options=dict(window_size=(64, 32)),
    ),
    decode_head=dict(in_channels=[256, 512, 1024, 2048]),
    auxiliary_head=dict(in_channels=1024),
)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    constructor='LayerDecayConstructor',
    optimizer=dict(type='AdamW', lr=8e-5, betas=(0.9, 0.999), weight_decay=0.05),
)
