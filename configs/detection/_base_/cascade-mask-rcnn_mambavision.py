"""Cascade Mask R-CNN on COCO with MambaVision: AdamW 1e-4, 36 epochs, batch size 8 x 2, DETR's crops, bf16.

Heads, losses and augmentation are those of mmdet's recipe for ConvNeXt. That the box heads have four convolutions and a
linear layer is derived from the published 740, 828 and 964 GFLOPs (T, S, B): at 1280 x 800, with the classifiers'
windows of 14 and 7, these models have 752, 818 and 991; with two linear layers instead they would have 344 fewer. The
published 86, 108 and 145 M parameters fit no heads: from size to size they grow by 22 and 37 M, the backbones by 18 and
47 M. These models have 89.2, 107.5 and 154.9 M.

The backbones' weights are licensed CC-BY-NC-SA-4.0, for non-commercial use.
"""

_base_ = 'mmdet::convnext/cascade-mask-rcnn_convnext-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py'
custom_imports = dict(imports=['vmamba.mm', 'vmamba.mm.roi_extractor'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='StageBackbone',
        # The official configs set 0.2, 0.3 and 0.5 (T, S, B), which their backbone ignores: all ran with 0.2.
        drop_path_rate=0.2,
        pretrained=True,
        model_options=dict(window_size=(112, 56)),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(type='Fp32RoIExtractor'),
        mask_roi_extractor=dict(type='Fp32RoIExtractor'),
    ),
)

optim_wrapper = dict(
    _delete_=True,
    type='AmpOptimWrapper',
    dtype='bfloat16',
    loss_scale=1.0,
    constructor='LayerDecayConstructor',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2, save_best='coco/segm_mAP'))
