"""Workers of main_pretrain.py that note what a test reads: a started process imports them by name."""

import os

import torch

import main_pretrain
from moco import distributed
from moco.train.pretraining import Trainer


def noting(args) -> int:
    """A worker that keeps each step's queue and parameters of its process."""
    original = Trainer.step
    kept = []

    def step(self, batches):
        original(self, batches)
        kept.append({name: value.clone() for name, value in self.model.state_dict().items()})

    Trainer.step = step
    code = main_pretrain.worker(args)
    torch.save(kept, os.path.join(args.save_dir, f"rank{distributed.rank()}.pt"))
    return code
