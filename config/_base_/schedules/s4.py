"""The published s4 schedule: 30 epochs, the backbone frozen for the first 5."""

_base_ = "../default_runtime.py"

optimizer = dict(type="AdamW", lr=2e-5, weight_decay=0.01)
loss = dict(type="SegmentationLoss", mask_loss="dice", mask_weight=1.0, mix_weight=0.1)
process = dict(train_epochs=30, freeze_epochs=5)
