"""The training stage of memopt: networks, data, training, pruning and distillation; checkpoints come out."""
