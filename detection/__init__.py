"""Detection transfer: from a pretraining checkpoint to detectron2's backbone."""
