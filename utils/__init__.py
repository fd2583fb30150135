"""Everything around the model: configuration, losses, metrics, checkpoints, training and pictures."""
