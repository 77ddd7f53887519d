_base_ = './_base_/upernet_vim.py'

model = dict(
    backbone=dict(variant='vim_s'),
    decode_head=dict(in_channels=[384, 384, 384, 384], channels=384),
    auxiliary_head=dict(in_channels=384),
)

# The official launch script of the published figure.
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.95))
