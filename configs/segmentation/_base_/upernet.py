"""UPerNet on ADE20K; configs add backbone, channels, schedule and optimizer."""

_base_ = ['./ade20k_512x512.py', './runtime.py']

norm_cfg = dict(type='SyncBN', requires_grad=True)
cross_entropy = dict(type='CrossEntropyLoss', use_sigmoid=False)
model = dict(
    type='EncoderDecoder',
    decode_head=dict(
        type='UPerHead',
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=512,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(loss_weight=1.0, **cross_entropy),
    ),
    auxiliary_head=dict(
        type='FCNHead',
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(loss_weight=0.4, **cross_entropy),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
