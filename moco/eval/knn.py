"""k-NN accuracy of frozen features, and how features are spread: the measures that need no training.

The bank is never in one place: each process keeps the features that it computed, queries go to all processes, and what
each of them finds nearest is merged. A shard is never compared at once either. With W processes this takes

- RAM of each process: its shares of the bank and of the queries, (n + m) / W rows (:mod:`moco.eval.features`);
- memory of the device: QUERY_ROWS + 2 BANK_ROWS rows of 4 F bytes (at F = 2048: 134 MB and twice 268 MB), and
  SIMILARITIES numbers (67 MB) with the largest of them.

Legend: n bank images, m queries, F feature width, C classes, k neighbours, T temperature, r rows of this process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import bars, distributed
from moco.data import Source, Sources
from moco.data.sources.base import without_labels
from moco.errors import UserError
from moco.eval.details import Counts, Details
from moco.eval.features import FeatureExtractor, Features, describe_unread, padded
from moco.pictures.confusion import count_confusions

BANK_ROWS = 32768  # a shard of the bank is compared in parts of this many rows
QUERY_ROWS = 16384  # queries of all processes that are answered in one pass over the bank
SIMILARITIES = 1 << 24  # that exist at one time: bounds the memory, not the result


def labelled_sets(sources: Sources) -> tuple[Source, Source]:
    """The bank and the queries of a data set; one and the same source when only one has labels.

    Raises:
        UserError: nothing is labelled.
    """
    if sources.train is not None and sources.val is not None:
        return sources.train, sources.val
    if sources.pretrain.labels is None:
        raise UserError(f"{without_labels(sources.pretrain)}: neighbours vote for classes, give class folders.")
    return sources.pretrain, sources.pretrain


def evaluate_knn(
    encoder: nn.Module, train: Source, val: Source, extractor: FeatureExtractor, *, k: Sequence[int] = (200,),
    temperature: float = 0.1, queries: Features | None = None, bank: Features | None = None,
) -> dict[int, float]:  # fmt: skip
    """Percent of ``val`` whose class the k nearest images of ``train`` vote for, for every k, in one pass.

    Every process takes a share of the images and of the queries; all of them must call and all get the result.
    Unreadable images neither vote nor count.

    Args:
        encoder: any network of :func:`moco.models.encoder.build_encoder`; its mode is put back.
        train, val: labelled sources with the same classes. One object for both: an image is not its own neighbour.
        extractor: how they become features.
        k, temperature: as in :func:`knn_predict`.
        queries, bank: this process's shares of ``val`` and of ``train``, if they were read already.

    Raises:
        UserError: a set that is both bank and queries holds a single image.
    """
    queries = _read(encoder, train, val, extractor) if queries is None else queries
    predicted = _classes_of(encoder, train, val, extractor, k, temperature, queries, bank)
    return _accuracies(predicted, queries.labels, k, extractor.device)


def _read(encoder: nn.Module, train: Source, val: Source, extractor: FeatureExtractor) -> Features:
    """This process's share of the queries."""
    if train is val and len(train) < 2:
        raise UserError(f"{train.name} holds one image, which has no neighbour; give more, or held-out ones.")
    return extractor.shard(encoder, val)


def _classes_of(
    encoder: nn.Module, train: Source, val: Source, extractor: FeatureExtractor, k: Sequence[int], temperature: float,
    queries: Features, bank: Features | None = None,
) -> Tensor:  # fmt: skip
    """What is predicted for this process's queries, (len(k), m) int64."""
    assert train.labels is not None and val.labels is not None
    if bank is None:
        bank = queries if train is val else extractor.shard(encoder, train)
    classes, own = int(max(train.labels.max(), val.labels.max())) + 1, bank.ids if train is val else None
    return knn_predict(
        bank, queries.x, k=k, temperature=temperature, num_classes=classes, own=own, device=extractor.device
    )


def _accuracies(predicted: Tensor, labels: Tensor, k: Sequence[int], device: torch.device) -> dict[int, float]:
    """In percent of the queries of all processes, for every k."""
    hits = (predicted == labels).sum(1)
    counts = torch.cat([hits, torch.tensor([len(labels)])]).to(device)
    *right, m = distributed.sum_over_ranks(counts).tolist()
    return {one: 100.0 * hit / m for one, hit in zip(k, right, strict=True)}


def knn_values(found: dict[int, float]) -> dict[str, float]:
    """Accuracies by the names under which they are logged: ``knn`` is of the first k, ``knn_20`` of k = 20."""
    first = next(iter(found.values()))
    return {"knn": first, **({f"knn_{k}": value for k, value in found.items()} if len(found) > 1 else {})}


def measure_knn(
    encoder: nn.Module, train: Source, val: Source, extractor: FeatureExtractor, k: Sequence[int], temperature: float,
    details: Details | None = None,
) -> tuple[dict[str, float], dict[str, Any], str]:  # fmt: skip
    """:func:`evaluate_knn` as numbers for a log, settings for a result file, and a line to read.

    details: of the first k, to be written as knn_confusion.
    """
    queries = _read(encoder, train, val, extractor)
    bank = queries if train is val else extractor.shard(encoder, train)
    predicted = _classes_of(encoder, train, val, extractor, k, temperature, queries, bank)
    found = _accuracies(predicted, queries.labels, k, extractor.device)
    if details:
        matrix = count_confusions(queries.labels.numpy(), predicted[0].numpy(), len(details.classes))
        whole = distributed.sum_over_ranks(torch.from_numpy(matrix).to(extractor.device)).cpu().numpy()
        what = f"k-NN, k {k[0]}, T {temperature:g}, {whole.sum():,} images"
        details.write(Counts(whole), what, "knn_confusion")
    asked = {"k": k[0], "T": temperature, "leave_one_out": train is val, "val_images": len(val) - queries.unread,
             "unreadable": queries.unread, "train_unreadable": bank.unread}  # fmt: skip
    percent, ks = "/".join(f"{value:.3f}" for value in found.values()), "/".join(map(str, found))
    alone = ", each image against the others" * (train is val)
    summary = f" * k-NN {percent} (k={ks}, T={temperature}, cosine, encoder features{alone})"
    return knn_values(found), asked, summary + left_out(train, val, bank, queries)


def left_out(train: Source, val: Source, bank: Features, queries: Features) -> str:
    """The end of a line: how many images could not be read; empty where every one votes and counts."""
    voters = f"; {bank.unread} of {len(train)} training images cannot be read and do not vote"
    return describe_unread(queries.unread, len(val)) + voters * (bank is not queries and bool(bank.unread))


@torch.no_grad()
def knn_predict(
    bank: Features, queries: Tensor, *, k: Sequence[int], temperature: float, num_classes: int,
    own: Tensor | None = None, device: torch.device | None = None,
) -> Tensor:  # fmt: skip
    """The weighted vote of the k most similar bank images, (len(k), m) int64 on the CPU.

    Cosine similarity s on l2-normalised features; each neighbour gives exp(s / T) to its class, the class with the most
    wins, the lower number when two are equal (InstDisc, arXiv 1805.01978, section 3.4). Of bank images that are equally
    similar the one with the lower number is nearer.

    With several processes each gives its shard of the bank and its own queries, and gets the votes of all shards on
    its queries.

    Args:
        bank: n images; their ids are numbers over all processes, and ascend.
        queries: (m, F).
        k: numbers of neighbours; a smaller bank votes as a whole.
        num_classes: C; labels are below it.
        own: (m,) ids of the queries where they are in the bank themselves: those do not vote on themselves.
        device: where to compute, by default where the queries are.
    """
    device = queries.device if device is None else device
    codes = bank.ids * num_classes + bank.labels  # one number for image and class
    answers = [torch.empty(len(k), 0, dtype=torch.int64)]
    for rows, s, code in most_similar(bank.x, codes, queries, max(k) + (own is not None), device):
        if own is not None:
            me = padded(own[rows, None], len(s)).to(device)
            s = s.masked_fill(code // num_classes == me, -torch.inf)
            s, code = _first(s, code, max(k))
        answers.append(_vote(s, code % num_classes, k, temperature, num_classes)[:, : len(queries[rows])].cpu())
    return torch.cat(answers, 1)


def most_similar(
    bank: Tensor, codes: Tensor, queries: Tensor, k: int, device: torch.device
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The k nearest images of all processes' shards of a bank to each query, by cosine similarity.

    Yields the rows of some of this process's queries, and for them similarities and codes, (r, k) each on the device,
    the nearest first, of equals the one with the lower code; r may be more than the queries, the others are of no
    account. A smaller bank leaves similarities of minus infinity at the end. Every process has to call.

    Args:
        bank: (n, F) this process's shard. codes: (n,) int64 by which its images are known, ascending over all shards.
        queries: (m, F) this process's.
    """
    rows, codes = -(-QUERY_ROWS // distributed.world_size()), codes.to(device)
    most = int(distributed.max_over_ranks(torch.tensor(len(queries), device=device)))
    for start in bars.counted(range(0, most, rows), -(-most // rows), "neighbours"):
        mine = slice(start, start + rows)
        asked = padded(F.normalize(queries[mine].to(device), dim=1), min(rows, most - start))
        yield mine, *_merged(*_nearest(distributed.all_gather(asked), bank, codes, k))


def _nearest(queries: Tensor, bank: Tensor, codes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Similarities and codes of each query's k nearest rows of the bank, (m, k) each, the nearest first.

    A smaller bank leaves similarities of minus infinity at the end.
    """
    best = queries.new_full((len(queries), k), -torch.inf)
    code = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
    rows = max(1, min(len(bank), BANK_ROWS, SIMILARITIES))
    step = max(1, SIMILARITIES // rows)
    for start in range(0, len(bank), rows):
        part = F.normalize(bank[start : start + rows].to(queries.device), dim=1)
        numbers = codes[start : start + rows]
        for first in range(0, len(queries), step):
            here = slice(first, first + step)
            near, where = _top(queries[here] @ part.T, k)
            near, found = torch.cat([best[here], near], 1), torch.cat([code[here], numbers[where]], 1)
            best[here], code[here] = _first(near, found, k)
    return best, code


def _top(s: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their columns, (m, k) each, columns ascending; of equals the first columns."""
    if k >= s.shape[1]:
        return s, torch.arange(s.shape[1], device=s.device).expand_as(s)
    near, where = s.topk(k + 1, dim=1)
    last = near[:, k - 1 : k]
    tied = (last == near[:, k:])[:, 0]  # topk would keep any of them
    where = where[:, :k].sort(dim=1).values
    if bool(tied.any()):
        row, last = s[tied], last[tied]
        above, equal = row > last, row == last
        taken = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
        where[tied] = taken.nonzero()[:, 1].view(-1, k)
    return s.gather(1, where), where


def _first(s: Tensor, code: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most similar, (m, k) each, in order; equals stay in the order in which they came."""
    s, order = s.sort(dim=1, descending=True, stable=True)
    return s[:, :k], code.gather(1, order[:, :k])


def _merged(s: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """From every query's nearest in this shard, (W * r, k), to the nearest in all shards of this process's, (r, k)."""
    world = distributed.world_size()
    if world == 1:
        return s, code
    m, k = s.shape
    s, code = (
        distributed.all_to_all_blocks(x).view(world, m // world, k).transpose(0, 1).flatten(1) for x in (s, code)
    )  # (r, W * k)
    code, order = code.sort(dim=1, stable=True)  # by image, for equals
    return _first(s.gather(1, order), code, k)


def _vote(s: Tensor, labels: Tensor, k: Sequence[int], temperature: float, num_classes: int) -> Tensor:
    """The class with the most votes of each query's first k neighbours, (len(k), m); s is sorted."""
    # Divided by the first neighbour's vote, so that a small T cannot overflow; in float64 the order in which votes are
    # added (by atomics on a GPU) does not decide the winner.
    weights = ((s - s[:, :1]).double() / temperature).exp()  # (m, k)
    votes = weights.new_zeros(len(s), num_classes)  # (m, C)
    winners, done = {}, 0
    for one in sorted(set(k)):
        votes.scatter_add_(1, labels[:, done:one], weights[:, done:one])
        winners[one], done = votes.argmax(1), one
    return torch.stack([winners[one] for one in k])
