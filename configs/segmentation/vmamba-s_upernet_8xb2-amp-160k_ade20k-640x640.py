"""Crops of 640 x 640; images are resized to a shorter side of 640."""

_base_ = './vmamba-s_upernet_8xb2-amp-160k_ade20k-512x512.py'

crop_size = (640, 640)
scale = (2560, 640)
train_pipeline = _base_.train_pipeline
train_pipeline[2].update(scale=scale)
train_pipeline[3].update(crop_size=crop_size)
test_pipeline = _base_.test_pipeline
test_pipeline[1].update(scale=scale)

model = dict(data_preprocessor=dict(size=crop_size))
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
