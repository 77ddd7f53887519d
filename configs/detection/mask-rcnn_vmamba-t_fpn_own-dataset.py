"""Mask R-CNN with VMamba-T on your own images, annotated in COCO's format.

Copy it by `vmamba configs copy mask-rcnn_vmamba-t_fpn_own-dataset --output my_configs`, and edit the two lines below.
The folder needs the images in train/ and val/, and annotations/train.json and annotations/val.json.
"""

_base_ = './mask-rcnn_vmamba-t_fpn_amp-1x_coco.py'

data_root = 'data/own/'
classes = ('cat', 'dog')  # names of the annotations' categories

model = dict(
    roi_head=dict(bbox_head=dict(num_classes=len(classes)), mask_head=dict(num_classes=len(classes))),
)
dataset = dict(data_root=data_root, metainfo=dict(classes=classes))
train_dataloader = dict(dataset=dict(ann_file='annotations/train.json', data_prefix=dict(img='train/'), **dataset))
val_dataloader = dict(dataset=dict(ann_file='annotations/val.json', data_prefix=dict(img='val/'), **dataset))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/val.json')
test_evaluator = val_evaluator
