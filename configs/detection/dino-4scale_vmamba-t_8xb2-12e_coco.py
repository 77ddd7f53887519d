"""DINO with VMamba-T, as a starting point; no figures are published.

In fp32, since mmcv's compiled deformable attention does not support bf16.
"""

_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'
custom_imports = dict(imports=['vmamba.mm'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='VMambaBackbone',
        variant='vmamba_t',
        out_indices=(1, 2, 3),
        drop_path_rate=0.2,
        pretrained=True,
    ),
    neck=dict(in_channels=[192, 384, 768]),
)
optim_wrapper = dict(constructor='LayerDecayConstructor')  # keeps the recipe's lr factor 0.1 for the backbone
