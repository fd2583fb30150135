"""The published ms3 schedule: 60 epochs, the backbone frozen for the first 10, the rate x 0.67 every 35."""

optimizer = dict(type="AdamW", lr=3e-5, weight_decay=0.01)
loss = dict(weight_dict=dict(iou_loss=1.0, mix_loss=0.1), loss_type="dice")
process = dict(
    num_works=8, train_epochs=60, freeze_epochs=10, lr_schedule=dict(type="StepLR", step_size=35, gamma=0.67)
)
