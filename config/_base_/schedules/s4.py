"""The published s4 schedule: 30 epochs, the backbone frozen for the first 5."""

optimizer = dict(type="AdamW", lr=2e-5, weight_decay=0.01)
loss = dict(weight_dict=dict(iou_loss=1.0, mix_loss=0.1), loss_type="dice")
process = dict(num_works=8, train_epochs=30, freeze_epochs=5)
