"""The published avss schedule: 30 epochs, scored every second one from the tenth on."""

optimizer = dict(type="AdamW", lr=2e-5, weight_decay=0.01)
loss = dict(weight_dict=dict(iou_loss=1.0, mix_loss=0.1))
process = dict(num_works=8, train_epochs=30, start_eval_epoch=10, eval_interval=2, freeze_epochs=0)
