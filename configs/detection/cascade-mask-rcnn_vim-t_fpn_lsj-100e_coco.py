_base_ = './_base_/cascade-mask-rcnn_vim.py'

model = dict(
    backbone=dict(variant='vim_t', drop_path_rate=0.0),
    neck=dict(in_channels=[192, 192, 192, 192]),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.7))
