_base_ = './_base_/upernet_mambavision.py'

model = dict(
    backbone=dict(variant='mambavision_s', model_options=dict(window_size=(160, 56))),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(optimizer=dict(lr=6e-5))
