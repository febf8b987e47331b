"""Checkpoints in other projects' layouts, built key by key."""

from collections.abc import Callable

import torch
from torch import nn


def prefixed(prefix: str, tensors: dict) -> dict:
    return {f"{prefix}{name}": value for name, value in tensors.items()}


class OwnBlock(nn.Module):
    """lightly's block of two 3x3 convolutions, by the names of its file; every ReLU is a function, not a module."""

    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
        self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)
        self.shortcut = nn.Sequential()
        if stride != 1 or inside != outside:
            self.shortcut.append(nn.Conv2d(inside, outside, 1, stride, bias=False)).append(nn.BatchNorm2d(outside))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


class OwnResNet(nn.Module):
    """lightly's own ResNet-18: the classifier's pooling and the ReLU after bn1 are functions as well."""

    def __init__(self, stem: int = 3):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, stem, (stem + 1) // 4, stem // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        for i, (inside, outside) in enumerate(((64, 64), (64, 128), (128, 256), (256, 512)), 1):
            first = OwnBlock(inside, outside, 1 if i == 1 else 2)
            self.add_module(f"layer{i}", nn.Sequential(first, OwnBlock(outside, outside, 1)))
        self.linear = nn.Linear(512, 10)
        for norm in (m for m in self.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.normal_(norm.running_mean)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x)).relu()
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.linear(x.mean((2, 3)))


def by_position(network: nn.Module) -> nn.Sequential:
    """The backbone that lightly's examples make of a network, in which only modules compute."""
    return nn.Sequential(*list(network.children())[:-1], nn.AdaptiveAvgPool2d(1))


def lightly(build: Callable[[], nn.Module]) -> tuple[dict, Callable]:
    network = build()
    entries = {name: value for name, value in network.state_dict().items() if not name.startswith("fc.")}
    momentum = prefixed("backbone_momentum.", {name: value + 1 for name, value in entries.items()})
    state = {**prefixed("backbone.", entries), **momentum, "projection_head.layers.0.weight": torch.zeros(8, 512)}
    return {"epoch": 9, "pytorch-lightning_version": "2.4.0", "state_dict": state}, network
