"""How a network is trained: loop, schedule, optimizers, checkpoints, log."""
