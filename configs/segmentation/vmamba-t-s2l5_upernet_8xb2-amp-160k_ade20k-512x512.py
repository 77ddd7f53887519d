_base_ = './_base_/upernet_amp-160k.py'

model = dict(
    backbone=dict(variant='vmamba_t_s2l5', drop_path_rate=0.2),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
