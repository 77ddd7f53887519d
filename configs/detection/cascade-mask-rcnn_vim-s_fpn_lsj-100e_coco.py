_base_ = './_base_/cascade-mask-rcnn_vim.py'

model = dict(
    backbone=dict(variant='vim_s', drop_path_rate=0.05),
    neck=dict(in_channels=[384, 384, 384, 384]),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.837))
