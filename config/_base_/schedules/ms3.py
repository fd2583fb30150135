"""The published ms3 schedule: 60 epochs, the backbone frozen for the first 10, the rate x 0.67 every 35."""

_base_ = "../default_runtime.py"

optimizer = dict(type="AdamW", lr=3e-5, weight_decay=0.01)
loss = dict(type="SegmentationLoss", mask_loss="dice", mask_weight=1.0, mix_weight=0.1)
process = dict(train_epochs=60, freeze_epochs=10, lr_schedule=dict(type="StepLR", step_size=35, gamma=0.67))
