"""On frozen, pretrained features: 4 clips per batch, a high rate, cosine to zero, BCE beside dice."""

_base_ = "../default_runtime.py"

optimizer = dict(type="AdamW", lr=1e-3, weight_decay=0.01)
loss = dict(type="SegmentationLoss", mask_loss="bce_dice", mask_weight=1.0, mix_weight=0.1)
process = dict(
    devices=dict(cpu=2, gpu=1),  # two processes of one thread each are faster than one of two
    num_workers=0,
    train_epochs=4,
    freeze_epochs=4,
    cache_backbone=True,
    lr_schedule=dict(type="cosine", warmup_steps=40, min_lr=0.0),
    clip_grad_norm=1.0,
)
