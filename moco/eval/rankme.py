"""RankMe: how many directions the features of a set use, without labels (Garrido et al., arXiv 2210.02885, equation 1).

    RankMe(Z) = exp(-sum_k p_k ln p_k)        p_k = sigma_k(Z) / |sigma(Z)|_1 + 1e-7

of the singular values sigma of the features Z (N, K) as they are, not centred and not normalised: 1 where all of them
lie on one line through the origin, min(N, K) where no direction is stronger than another. As in the paper it is
measured on images of the pretraining, 25,600 at most, and compares checkpoints and runs of one method.

The singular values are the roots of the eigenvalues of the Gram matrix Z^T Z (K, K), summed in float64: no process
needs the features of another, and it takes less time than singular values in float32 (15 s and 25 s on two cores for N
25,600, K 2,048). At K 512 its error relative to an SVD in float64 was 1e-15 for full rank and at most 6e-5, for rank 1,
below the 8e-4 that the term 1e-7 itself adds there. An SVD in float32 has 2e-3, a Gram matrix in float32 45 %.

Legend: N images of all processes, r of this one, K width of the features.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch
from torch import Tensor, nn

from moco import distributed
from moco.data import Source
from moco.data.sources.subset import Subset
from moco.eval.features import FeatureExtractor, Features, describe_unread
from moco.seeding import numpy_generator

MOST_IMAGES = 25_600  # the paper's; its appendix G has the error of fewer
EPSILON = 1e-7  # the paper's, for float32
ROWS = 4096  # that are in float64 at a time: 67 MB at K = 2048


@torch.no_grad()
def rankme(z: Tensor, device: torch.device) -> float:
    """RankMe of features, of which each process has (r, K); every process has to call and all get the result.

    NaN where a feature is not finite: a measure ends no run.
    """
    K = z.shape[1]
    gram = torch.zeros(K, K, dtype=torch.float64, device=device)
    for part in z.split(ROWS):
        rows = part.to(device, torch.float64)
        gram.addmm_(rows.T, rows)
    gram = distributed.sum_over_ranks(gram)
    n = int(distributed.sum_over_ranks(torch.tensor(len(z), device=device)))
    if not gram.isfinite().all():
        return math.nan
    sigma = torch.linalg.eigvalsh(gram)[-min(n, K) :].clamp(min=0.0).sqrt()
    p = sigma / sigma.sum().clamp(min=torch.finfo(torch.float64).tiny) + EPSILON
    return float((-(p * p.log()).sum()).exp())


def sample(n: int, seed: int) -> np.ndarray:
    """The numbers of the images that are measured, of ``n``, ascending; the same ones every time."""
    if n <= MOST_IMAGES:
        return np.arange(n)
    return np.sort(numpy_generator("rankme", seed).choice(n, MOST_IMAGES, replace=False))


def measure_rankme(
    encoder: nn.Module, source: Source, extractor: FeatureExtractor, seed: int, read: Features | None = None
) -> tuple[dict[str, float], str]:
    """RankMe of a sample of ``source``, which needs no labels, before the head and behind it, and a line to read.

    Args:
        seed: of the sample.
        read: this process's share of all of ``source`` with what leaves the head, if it was read already.
    """
    rows = sample(len(source), seed)
    if read is None:
        unlabelled = copy.copy(source)
        unlabelled.labels = np.full(len(source), -1)  # which a pass carries along, and nothing here asks for
        share = extractor.shard(encoder, Subset(unlabelled, rows, source.name), head=True)
        x, z = share.x, share.z
    else:
        kept = torch.isin(read.ids, torch.from_numpy(rows))
        x, z = read.x[kept], read.z[kept] if read.z is not None else None
    assert z is not None
    values = {"rankme": rankme(x, extractor.device), "rankme_head": rankme(z, extractor.device)}
    before, behind = (f"{value:.1f} of {width.shape[1]}" for value, width in zip(values.values(), (x, z), strict=True))
    counted = int(distributed.sum_over_ranks(torch.tensor(len(x), device=extractor.device)))
    left_out = describe_unread(len(rows) - counted, len(rows))
    return values, f"RankMe {before} (encoder features), {behind} (behind the head){left_out}"
