"""UPerNet with Vim: AdamW 1e-4 with layer decay, 60,000 iterations, batch size 4 x 8, bf16."""

_base_ = './upernet.py'

model = dict(
    backbone=dict(type='VimBackbone', drop_path_rate=0.1, pretrained=True, model_options=dict(img_size=512)),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)),
)

train_dataloader = dict(batch_size=8)
train_cfg = dict(type='IterBasedTrainLoop', max_iters=60000, val_interval=6000)
default_hooks = dict(checkpoint=dict(interval=6000))
optim_wrapper = dict(
    type='AmpOptimWrapper',
    dtype='bfloat16',
    loss_scale=1.0,
    constructor='LayerDecayConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.92),
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=60000),
]
auto_scale_lr = dict(enable=False, base_batch_size=32)
