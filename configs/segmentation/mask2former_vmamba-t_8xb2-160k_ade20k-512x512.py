"""Mask2Former with VMamba-T, as a starting point; no figures are published. It needs mmdet.

In fp32, since mmcv's compiled deformable attention does not support bf16.
"""

_base_ = ['./_base_/ade20k_512x512.py', './_base_/runtime.py']
custom_imports = dict(imports=['vmamba.mm', 'mmdet.models'], allow_failed_imports=False)

dim, classes = 256, 150
attention = dict(embed_dims=dim, num_heads=8, batch_first=True)
position = dict(num_feats=dim // 2, normalize=True)
feedforward = dict(embed_dims=dim, num_fcs=2, act_cfg=dict(type='ReLU', inplace=True))
mask_loss = dict(type='mmdet.CrossEntropyLoss', use_sigmoid=True, reduction='mean', loss_weight=5.0)
dice_loss = dict(
    type='mmdet.DiceLoss', use_sigmoid=True, activate=True, reduction='mean', naive_dice=True, eps=1.0, loss_weight=5.0
)

model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(test_cfg=dict(size_divisor=32)),
    backbone=dict(type='VMambaBackbone', variant='vmamba_t', drop_path_rate=0.2, pretrained=True),
    decode_head=dict(
        type='Mask2FormerHead',
        in_channels=[96, 192, 384, 768],
        strides=[4, 8, 16, 32],
        feat_channels=dim,
        out_channels=dim,
        num_classes=classes,
        num_queries=100,
        num_transformer_feat_level=3,
        align_corners=False,
        pixel_decoder=dict(
            type='mmdet.MSDeformAttnPixelDecoder',
            num_outs=3,
            norm_cfg=dict(type='GN', num_groups=32),
            act_cfg=dict(type='ReLU'),
            encoder=dict(
                num_layers=6,
                layer_cfg=dict(
                    self_attn_cfg=dict(num_levels=3, num_points=4, dropout=0.0, **attention),
                    ffn_cfg=dict(feedforward_channels=1024, ffn_drop=0.0, **feedforward),
                ),
            ),
            positional_encoding=position,
        ),
        enforce_decoder_input_project=False,
        positional_encoding=position,
        transformer_decoder=dict(
            return_intermediate=True,
            num_layers=9,
            layer_cfg=dict(
                self_attn_cfg=dict(dropout=0.0, **attention),
                cross_attn_cfg=dict(dropout=0.0, **attention),
                ffn_cfg=dict(feedforward_channels=2048, ffn_drop=0.0, **feedforward),
            ),
        ),
        loss_cls=dict(
            type='mmdet.CrossEntropyLoss',
            use_sigmoid=False,
            loss_weight=2.0,
            reduction='mean',
            class_weight=[1.0] * classes + [0.1],
        ),
        loss_mask=mask_loss,
        loss_dice=dice_loss,
        train_cfg=dict(
            num_points=12544,
            oversample_ratio=3.0,
            importance_sample_ratio=0.75,
            assigner=dict(
                type='mmdet.HungarianAssigner',
                match_costs=[
                    dict(type='mmdet.ClassificationCost', weight=2.0),
                    dict(type='mmdet.CrossEntropyLossCost', weight=5.0, use_sigmoid=True),
                    dict(type='mmdet.DiceCost', weight=5.0, pred_act=True, eps=1.0),
                ],
            ),
            sampler=dict(type='mmdet.MaskPseudoSampler'),
        ),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)

train_cfg = dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=16000)
embedding = dict(lr_mult=1.0, decay_mult=0.0)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    clip_grad=dict(max_norm=0.01, norm_type=2),
    constructor='LayerDecayConstructor',
    paramwise_cfg=dict(
        custom_keys={
            'backbone': dict(lr_mult=0.1),
            'query_embed': embedding,
            'query_feat': embedding,
            'level_embed': embedding,
        },
    ),
)
param_scheduler = [dict(type='PolyLR', eta_min=0.0, power=0.9, by_epoch=False, begin=0, end=160000)]
auto_scale_lr = dict(enable=False, base_batch_size=16)
