"""From random weights in minutes: a high rate, warm-up, cosine to zero."""

_base_ = "../default_runtime.py"

optimizer = dict(type="AdamW", lr=3e-4, weight_decay=0.01)
loss = dict(type="SegmentationLoss", mask_loss="dice", mask_weight=1.0, mix_weight=0.1)
process = dict(
    num_workers=1,
    train_epochs=8,
    freeze_epochs=0,
    lr_schedule=dict(type="cosine", warmup_steps=50, min_lr=0.0),
    clip_grad_norm=1.0,
)
