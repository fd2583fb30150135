"""The published avss schedule: 30 epochs, scored every second one from the tenth on."""

_base_ = "../default_runtime.py"

optimizer = dict(type="AdamW", lr=2e-5, weight_decay=0.01)
loss = dict(type="SegmentationLoss", mask_weight=1.0, mix_weight=0.1)  # several classes: cross entropy
process = dict(train_epochs=30, start_eval_epoch=10, eval_interval=2, freeze_epochs=0)
