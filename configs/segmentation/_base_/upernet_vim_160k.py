"""UPerNet with Vim on the longer schedule of VMamba's configs: 160,000 iterations, batch size 8 x 2."""

_base_ = './upernet_vim.py'

train_dataloader = dict(batch_size=2)
train_cfg = dict(max_iters=160000, val_interval=16000)
default_hooks = dict(checkpoint=dict(interval=16000))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=1500, end=160000),
]
auto_scale_lr = dict(base_batch_size=16)
