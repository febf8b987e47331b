"""k-NN accuracy of frozen features, and how features are spread: the measures that need no training.

Legend: n bank images, m queries, N images of a batch, F feature width, C classes, k neighbours, T temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import distributed
from moco.data import EpochSampler, Labelled, Source, make_loader, normalise
from moco.encoder import features

Numbers = Sequence[float] | Tensor  # one a channel

BANK_ROWS = 32768  # the bank is compared in parts of this many rows


def evaluate_knn(
    encoder: nn.Module,
    train: Source,
    val: Source,
    *,
    size: int,
    batch_size: int,
    device: torch.device,
    mean: Numbers,
    std: Numbers,
    k: int = 200,
    temperature: float = 0.1,
    workers: int = 0,
    amp: torch.dtype | None = None,
    what: str = "features",
    note: Callable[[dict[str, Tensor], Source], object] | None = None,
) -> float:
    """Percent of ``val`` whose class the nearest images of ``train`` vote for, without augmentation.

    Every process takes a share of the images and of the queries; all of them must call and all get the result.

    Args:
        encoder: any network of :func:`moco.encoder.build_encoder`; its mode is put back.
        train, val: labelled sources with the same classes.
        size: side of the views in pixels.
        batch_size: images a step over all processes.
        mean, std: C numbers each, of the channels.
        k, temperature, what, note: as in :func:`knn_predict` and :func:`extract`.
        workers: loader processes of this process.
        amp: the encoder's arithmetic, None for fp32.
    """
    world, rank = distributed.world_size(), distributed.rank()
    # Running statistics are each process's own; all embed with the main one's, which is what a checkpoint holds.
    distributed.broadcast_buffers(list(encoder.buffers()))
    batch = -(-batch_size // world) * world  # only speed depends on it
    sets = []
    for source in (train, val):
        sampler = EpochSampler(len(source), batch, 0, world, rank, drop_last=False, shuffle=False)
        loader = make_loader(Labelled(source, size, train=False), sampler, workers, device.type == "cuda")
        sets.append(extract(encoder, loader, device, mean, std, what, amp, note))
    (bank, bank_labels), (queries, labels) = sets
    mine = slice(rank, None, world)
    classes = int(max(bank_labels.max(), labels.max())) + 1
    predicted = knn_predict(
        bank.to(device), bank_labels.to(device), queries[mine].to(device),
        k=k, temperature=temperature, num_classes=classes,
    )  # fmt: skip
    hits = distributed.sum_over_ranks((predicted == labels[mine].to(device)).sum())
    return 100.0 * int(hits) / len(labels)


@torch.no_grad()
def extract(
    encoder: nn.Module,
    loader: Any,
    device: torch.device,
    mean: Numbers,
    std: Numbers,
    what: str = "features",
    amp: torch.dtype | None = None,
    note: Callable[[dict[str, Tensor], Source], object] | None = None,
) -> tuple[Tensor, Tensor]:
    """What the frozen encoder makes of a labelled set, on the CPU: (n, F) fp32 and labels (n,), in the set's order.

    Args:
        loader: batches of :class:`moco.data.Labelled` whose sampler neither shuffles nor drops; with several
            processes each computes its share and all receive everything.
        what: "features" is what enters the head, "output" what leaves it.
        amp: the encoder's arithmetic, None for fp32.
        note: called with every batch of this process and its source, for instance to count unreadable images.
    """
    compute = {"features": features, "output": lambda network, images: network(images)}[what]
    training = encoder.training
    encoder.eval()
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    try:
        for batch in loader:
            if note is not None:
                note(batch, loader.dataset.source)
            images = normalise(batch["image"].to(device, non_blocking=True), mean, std)
            with torch.autocast(device.type, amp, enabled=amp is not None):
                x = compute(encoder, images)  # (N, F)
            rows.append(distributed.gather_keys(x.float()).cpu())
            labels.append(distributed.gather_keys(batch["label"].to(device)).cpu())
    finally:
        encoder.train(training)
    n = len(loader.dataset)  # the last step may repeat images so that every process has as many
    return torch.cat(rows)[:n], torch.cat(labels)[:n]


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = 200,
    temperature: float = 0.1,
    num_classes: int,
    chunk: int = 1 << 24,
) -> float:
    """Percent of queries whose label :func:`knn_predict` gives."""
    predicted = knn_predict(
        train_features, train_labels, test_features, k=k, temperature=temperature, num_classes=num_classes, chunk=chunk
    )
    return 100.0 * int((predicted == test_labels).sum()) / len(test_labels)


@torch.no_grad()
def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    k: int,
    temperature: float,
    num_classes: int,
    chunk: int = 1 << 24,
) -> Tensor:
    """The weighted vote of the k most similar bank images, (m,) int64.

    Cosine similarity s on l2-normalised features; each neighbour gives exp(s / T) to its class, the class with the most
    wins, the lower number when two are equal (InstDisc, arXiv 1805.01978, section 3.4).

    Args:
        train_features, train_labels: the bank, (n, F) and (n,) int64.
        test_features: (m, F).
        k: neighbours; a smaller bank votes as a whole.
        num_classes: C; labels are below it.
        chunk: similarities that exist at one time; bounds the memory, not the result.
    """
    bank, queries = F.normalize(train_features, dim=1), F.normalize(test_features, dim=1)
    k = min(k, len(bank))
    rows = min(len(bank), BANK_ROWS, chunk)
    predicted = [
        _vote(*_nearest(part, bank, k, rows), train_labels, temperature, num_classes)
        for part in queries.split(max(1, chunk // rows))
    ]
    return torch.cat(predicted)


def _nearest(queries: Tensor, bank: Tensor, k: int, rows: int) -> tuple[Tensor, Tensor]:
    """Similarities and places of the k nearest, (m, k) each; of a bank seen ``rows`` at a time."""
    best = queries.new_empty(len(queries), 0)
    place = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), rows):
        s = queries @ bank[start : start + rows].T  # (m, rows)
        near, where = s.topk(min(k, s.shape[1]), dim=1)
        best, place = torch.cat([best, near], 1), torch.cat([place, where + start], 1)
        best, order = best.topk(min(k, best.shape[1]), dim=1)
        place = place.gather(1, order)
    return best, place


def _vote(s: Tensor, place: Tensor, labels: Tensor, temperature: float, num_classes: int) -> Tensor:
    # Divided by the first neighbour's vote, so that a small T cannot overflow; in float64 the order in which votes are
    # added (by atomics on a GPU) does not decide the winner.
    weights = ((s - s[:, :1]).double() / temperature).exp()  # (m, k)
    votes = weights.new_zeros(len(s), num_classes).scatter_add_(1, labels[place], weights)  # (m, C)
    return votes.argmax(1)


def alignment(q: Tensor, k: Tensor) -> Tensor:
    """Mean squared distance of unit rows to their positives, (): E |q - k|^2 (Wang and Isola, arXiv 2005.10242)."""
    return (q - k).square().sum(1).mean()


def uniformity(q: Tensor, t: float = 2.0) -> Tensor:
    """log of the mean of exp(-t |q_i - q_j|^2) over pairs i < j of unit rows, () (arXiv 2005.10242); low is even."""
    squared = torch.pdist(q).square()
    return torch.logsumexp(-t * squared, 0) - torch.tensor(float(len(squared)), device=q.device).log()
