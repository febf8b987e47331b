"""`python -m tests.runs.chaos.resnet FILE`: a ResNet-50 with fresh weights as a pretraining's checkpoint."""

import sys

import torch

from moco.models.encoder import build_encoder

if __name__ == "__main__":
    torch.manual_seed(0)
    entries = {f"module.encoder_q.{name}": x for name, x in build_encoder("resnet50", 128).state_dict().items()}
    torch.save({"epoch": 2, "arch": "resnet50", "state_dict": entries, "optimizer": {}}, sys.argv[1])
