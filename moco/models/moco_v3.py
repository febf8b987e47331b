"""MoCo v3: no queue, a predictor behind the query encoder, a momentum that grows, and ViTs that begin as published.

arXiv 2104.02057, algorithm 1 and section 4, with what its public code adds. BatchNorm has the statistics of all
processes, so that keys need not be shuffled.

Legend: N images of this process, G of all processes, L small crops an image, C feature width, h x w patches.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moco import distributed
from moco.config import MoCoV3Config
from moco.errors import UserError
from moco.methods import moco_v3
from moco.methods.losses import Pairs, rank_statistics, unit
from moco.models.base import Momentum, StepOutput, by_crop
from moco.models.batchnorm import sync_batchnorm
from moco.models.build import Context
from moco.models.encoder import head_of, use_heads


class MoCoV3(Momentum):
    """Momentum contrast over a batch of G images. Projection MLPs take the place of the encoders' linear heads."""

    STATS = ("loss", "top1", "top5", "hardest")

    def __init__(self, encoder_q: nn.Module, encoder_k: nn.Module, config: MoCoV3Config, batch: int):
        vit = hasattr(encoder_q, "patch_embed") or hasattr(encoder_q, "class_token")
        hidden = [config.hidden] * (2 if vit else 1)
        for encoder in (encoder_q, encoder_k):
            start_vit(encoder, config.freeze_patches) if vit else start_resnet(encoder)
            last = encoder.get_submodule(head_of(encoder))
            if not isinstance(last, nn.Linear):
                raise UserError("--method moco_v3 puts its MLP in the place of one linear layer; choose another -a.")
            encoder.set_submodule(head_of(encoder), mlp([last.in_features, *hidden, config.C]))
            sync_batchnorm(encoder)
        super().__init__(encoder_q, encoder_k, config, config.m)
        self.config, self.chance = config, 4 * self.T * math.log(max(batch, 2))
        self.predictor = sync_batchnorm(mlp([config.C, config.hidden, config.C], last_norm=vit))
        self.loss = moco_v3.loss(config)

    def begin_step(self, step: int, total: int) -> None:
        """The momentum of this step."""
        self.m = moco_v3.momentum(self.config.m, step, total) if self.config.m_cosine else self.config.m

    def forward(
        self, views: Sequence[Tensor], ids: Tensor, epoch: int = 0, draw: int = 0, step: int = 0,
        local: Tensor | None = None,
    ) -> StepOutput:  # fmt: skip
        """The loss of one batch, the sum over both directions: its mean over the processes is that of one process.
        ``views`` and ``local`` as :class:`moco.models.moco.MoCo`'s, small crops ask the keys of both views; the other
        arguments are not used."""
        q1, q2 = (self._predict(view) for view in views)
        k1, k2 = (self.forward_k(view) for view in views)
        small = by_crop(self._predict, local)
        with self.timer("head"):
            directions = [self._against(k, q, *small) for q, k in ((q1, k2), (q2, k1))]
            losses = [torch.cat([self.loss(each, self.T) for each in pairs]).mean() for pairs in directions]
            loss = torch.stack(losses).sum()
        q, paired = unit(q1.detach()), unit(k2)
        return StepOutput(loss, rank_statistics(directions[0][0]), q, paired, paired[:0])

    def _predict(self, images: Tensor) -> Tensor:
        """(N, C) with a gradient."""
        return self.predictor(self.forward_q(images))

    def _against(self, k: Tensor, *queries: Tensor) -> list[Pairs]:
        """Of each (N, C) of queries its pairs with the keys (N, C) of all processes."""
        keys, first = distributed.all_gather(k), distributed.rank() * len(k)
        return [moco_v3.against_keys(q, keys, first) for q in queries]


def mlp(widths: list[int], last_norm: bool = True) -> nn.Sequential:
    """Linear layers without biases from width to width, each but the last followed by BatchNorm and ReLU, the last with
    ``last_norm`` by BatchNorm without scale and shift."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-2], *[nn.BatchNorm1d(widths[-1], affine=False)] * last_norm)


def start_resnet(encoder: nn.Module) -> None:
    """The last BatchNorm of each residual block begins with scale 0."""
    for block in encoder.modules():
        last = getattr(block, "bn3", None) or getattr(block, "bn2", None)
        if hasattr(block, "downsample") and isinstance(last, nn.BatchNorm2d):
            nn.init.zeros_(last.weight)


def start_vit(vit: Any, freeze_patches: bool) -> None:
    """Sines and cosines as positions that stay, and the published initial weights; a patch embedding that stays."""
    patches, table = getattr(vit, "patch_embed", None), getattr(vit, "pos_embed", None)
    if table is None or patches is None or vit.embed_dim % 4 or table.shape[1] != 1 + math.prod(patches.grid_size):
        raise UserError("--method moco_v3 takes timm's ViTs with a class token, such as -a vit_base_patch16_224.")
    width, (h, w) = vit.embed_dim, patches.grid_size
    table.requires_grad_(False)[0] = torch.cat([torch.zeros(1, width), positions(h, w, width)])
    for name, layer in vit.named_modules():
        if isinstance(layer, nn.Linear) or layer is patches.proj:
            for weight in layer.weight.data.flatten(1).chunk(3 if name.endswith("qkv") else 1):  # three layers in one
                nn.init.xavier_uniform_(weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    patches.proj.requires_grad_(not freeze_patches)
    nn.init.normal_(vit.cls_token, std=1e-6)
    if width in (192, 384):  # where timm's has fewer heads
        use_heads(vit, 12)
        vit.changes = {"num_heads": 12}


def positions(h: int, w: int, width: int) -> Tensor:
    """(h w, width): sines and cosines of a patch's row, then of its column, at width / 4 wavelengths to 10,000."""
    rates = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    row, column = (place[:, None] * rates for place in torch.cartesian_prod(torch.arange(h), torch.arange(w)).T)
    return torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=1)


def build(encoder_q: nn.Module, encoder_k: nn.Module, config: MoCoV3Config, context: Context) -> tuple[MoCoV3, str]:
    """The model, and a line for the log."""
    batch = context.batch * distributed.world_size()
    model = MoCoV3(encoder_q, encoder_k, config, batch)
    summary = f"each query against {batch} keys of the batch, loss in fp32; BatchNorm over each view of all processes"
    return model, f"{summary}; momentum {config.m:g}" + " to 1 over the run" * config.m_cosine
