"""Plans of U-Mamba: small ones for tests, and the published ones with their numbers of parameters."""

import torch
import torch.nn.functional as F

from vmamba.models import UMamba

# Blocks are those that the reduction leaves. The Enc networks have stages with both kinds of tokens.
FLAT = dict(
    patch_size=[16, 24],
    features=[4, 6, 8, 12],
    kernel_sizes=[[3, 3], [3, 3], [1, 3], [3, 3]],
    strides=[[1, 1], [2, 2], [2, 2], [2, 2]],
    encoder_blocks=[2, 2, 1, 1],
    decoder_blocks=[2, 2, 1],
)
SOLID = dict(
    patch_size=[4, 8, 12],
    features=[4, 8, 14],
    kernel_sizes=[[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    encoder_blocks=[2, 2, 1],
    decoder_blocks=[2, 2],
)


def flat(patch_size, stages):
    """A published 2-D plan."""
    features = [min(32 * 2**s, 512) for s in range(stages)]
    return dict(
        patch_size=patch_size,
        features=features,
        kernel_sizes=[[3, 3]] * stages,
        strides=[[1, 1]] + [[2, 2]] * (stages - 1),
    )


ABDOMEN_3D = dict(
    patch_size=[40, 224, 192],
    features=[32, 64, 128, 256, 320, 320],
    kernel_sizes=[[1, 3, 3]] + [[3, 3, 3]] * 5,
    strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]],
)
# Plan, channels of the images, classes, parameters of Bot and Enc, and stages of Enc with channels as tokens with the
# sizes of these.
PUBLISHED = {
    'abdomen-mr-2d': (flat([320, 320], 7), 1, 14, 47_533_012, 47_015_538, {4: 400, 6: 25}),
    'endoscopy-2d': (flat([384, 640], 7), 3, 8, 47_524_592, 47_680_592, {6: 60}),
    'microscopy-2d': (flat([512, 512], 8), 3, 3, 64_797_301, 64_014_261, {5: 256, 7: 16}),
    'abdomen-ct-3d': (ABDOMEN_3D, 1, 14, 41_945_158, 42_842_798, {5: 210}),
    'abdomen-mr-3d': ({**ABDOMEN_3D, 'patch_size': [48, 160, 224]}, 1, 14, 41_945_158, 42_842_798, {5: 210}),
}


def build(kind, plan, **options):
    return UMamba(kind, **{**dict(in_chans=2, num_classes=3), **plan, **options})


def train(model, plan, steps, dtype):
    """Losses of some steps with nnU-Net's optimiser under autocast, on random images, whose sign is the class."""
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, momentum=0.99, nesterov=True, weight_decay=3e-5)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    images = torch.randn(2, model.in_chans, *plan['patch_size'], device=device)
    target, losses = (images[:, 0] > 0).long(), []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype):
            loss = F.cross_entropy(model(images)[0], target)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 12)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses
