"""From random weights in minutes: a high rate, warm-up, cosine to zero."""

optimizer = dict(type="AdamW", lr=3e-4, weight_decay=0.01)
loss = dict(weight_dict=dict(iou_loss=1.0, mix_loss=0.1), loss_type="dice")
process = dict(
    num_works=1,
    train_epochs=8,
    freeze_epochs=0,
    lr_schedule=dict(type="cosine", warmup_steps=50, min_lr=0.0),
    clip_grad_norm=1.0,
)
