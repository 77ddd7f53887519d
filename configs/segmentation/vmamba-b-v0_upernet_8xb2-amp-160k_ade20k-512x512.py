_base_ = './_base_/upernet_amp-160k.py'

model = dict(
    backbone=dict(variant='vmamba_b_v0', drop_path_rate=0.3),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
