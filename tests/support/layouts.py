"""Checkpoints in other projects' layouts, built key by key."""

from collections.abc import Callable

import torch
import torchvision
from torch import nn

C = 128  # width of the features that a loss compares


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


def resnet(head: nn.Module | None = None, arch: str = "resnet18") -> nn.Module:
    """torchvision's own network, as upstream builds it, with random running statistics."""
    network = torchvision.models.get_model(arch, weights=None, num_classes=C)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.normal_()
    if head is not None:
        network.fc = head
    return network


def small(padding: int = 1) -> nn.Module:
    network = resnet()
    network.conv1 = nn.Conv2d(3, 64, 3, padding=padding, bias=False)
    network.maxpool = nn.Identity()
    return network


def without_head(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in network.state_dict().items() if not name.startswith("fc.")}


def moco_v3() -> tuple[dict, Callable]:
    network = resnet(nn.Identity())
    head = nn.Sequential(nn.Linear(512, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16, bias=False))
    entries = {**network.state_dict(), **prefixed("fc.", head.state_dict())}
    other = prefixed("module.momentum_encoder.", resnet().state_dict())
    entries = {**prefixed("module.base_encoder.", entries), **other, "module.predictor.0.weight": torch.zeros(8, 8)}
    return {"epoch": 300, "arch": "resnet18", "state_dict": entries}, network


def moco_v3_vit() -> tuple[dict, Callable]:
    import timm

    network = timm.create_model("vit_small_patch16_224", num_heads=12, img_size=32, depth=12, num_classes=0)
    with torch.no_grad():
        network.pos_embed[0, 0] = 0  # its positions are sines and cosines, the class token has none
    head = {"head.0.weight": torch.zeros(8, 384), "head.1.running_mean": torch.zeros(8)}
    entries = prefixed("module.base_encoder.", {**network.state_dict(), **head})
    return {"epoch": 300, "arch": "vit_small", "state_dict": entries}, network


def barlow_twins(whole: bool) -> tuple[dict, Callable]:
    network = resnet(nn.Identity())
    if not whole:
        return dict(network.state_dict()), network
    extra = {"module.projector.0.weight": torch.zeros(8, 512), "module.bn.running_mean": torch.zeros(8)}
    return {"epoch": 1000, "model": {**prefixed("module.backbone.", network.state_dict()), **extra}}, network


def solo_learn(prefix: str) -> tuple[dict, Callable]:
    network = small(padding=2)
    head = {"classifier.weight": torch.zeros(10, 512), "classifier.bias": torch.zeros(10)}
    head |= {"queue": torch.zeros(2, 8, 16), "projector.0.weight": torch.zeros(8, 512)}
    state = {**prefixed(f"{prefix}.", without_head(network)), **head}
    state |= prefixed(f"momentum_{prefix}.", {name: value + 1 for name, value in without_head(network).items()})
    return {"epoch": 999, "pytorch-lightning_version": "1.6.4", "state_dict": state}, network


def lightly(build: Callable[[], nn.Module]) -> tuple[dict, Callable]:
    network = build()
    entries = {name: value for name, value in network.state_dict().items() if not name.startswith("fc.")}
    momentum = prefixed("backbone_momentum.", {name: value + 1 for name, value in entries.items()})
    state = {**prefixed("backbone.", entries), **momentum, "projection_head.layers.0.weight": torch.zeros(8, 512)}
    return {"epoch": 9, "pytorch-lightning_version": "2.4.0", "state_dict": state}, network


THEIRS = {  # a file of each project that docs/migrating/ is about, and whose layout is its own
    "barlow_twins": lambda: barlow_twins(True),
    "lightly": lambda: lightly(lambda: by_position(resnet())),
    "moco_v3": moco_v3,
    "solo_learn": lambda: solo_learn("backbone"),
}
