_base_ = './_base_/upernet_vim.py'

model = dict(
    backbone=dict(variant='vim_t'),
    decode_head=dict(in_channels=[192, 192, 192, 192], channels=192),
    auxiliary_head=dict(in_channels=192),
)

# The official launch script of the published figure.
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=0.1))
