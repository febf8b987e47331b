"""k-NN accuracy of frozen features, and how features are spread: the measures that need no training.

The bank is never in one place: each process keeps the features that it computed, queries go to all processes, and what
each of them finds nearest is merged. A shard is never compared at once either. With W processes this takes

- RAM of each process: its shares of the bank and of the queries, (n + m) / W rows of 4 F bytes (the 1.28 million
  features of ImageNet at F = 2048 are 10.5 GB in one process and 1.3 GB in each of eight);
- memory of the device: QUERY_ROWS + 2 BANK_ROWS rows (at F = 2048: 134 MB and twice 268 MB), and ``chunk``
  similarities (67 MB) with the largest of them.

Legend: n bank images, m queries, N images of a batch, F feature width, D width behind the head, C classes,
k neighbours, T temperature, r rows of this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import distributed
from moco.data import EpochSampler, Labelled, Loader, Source, Sources, make_loader
from moco.errors import UserError
from moco.models.encoder import around_head, features
from moco.models.inputs import normalise

Numbers = Sequence[float] | Tensor  # one a channel
Note = Callable[[dict[str, Tensor], Source], object]

BANK_ROWS = 32768  # a shard of the bank is compared in parts of this many rows
QUERY_ROWS = 16384  # queries of all processes that are answered in one pass over the bank


# ------------------------------------------------------------------------------------------- images to features


@dataclass(frozen=True)
class FeatureExtractor:
    """How the images of a set become features, without augmentation.

    size: side of the views in pixels. batch_size: images a step over all processes. mean, std: a number a channel each.
    workers: loader processes of this process. amp: the encoder's arithmetic, None for fp32. note: called with every
    batch of this process and its source, for instance to count unreadable images.
    """

    size: int
    batch_size: int
    device: torch.device
    mean: Numbers
    std: Numbers
    workers: int = 0
    amp: torch.dtype | None = None
    note: Note | None = None

    def loader(self, source: Source) -> Loader:
        """This process's share of each batch of ``source``, in its order."""
        world = distributed.world_size()
        batch = -(-self.batch_size // world) * world  # only speed depends on it
        sampler = EpochSampler(len(source), batch, 0, world, distributed.rank(), drop_last=False, shuffle=False)
        views = Labelled(source, self.size, train=False)
        return make_loader(views, sampler, self.workers, self.device.type == "cuda")


@dataclass(frozen=True)
class Features:
    """The images of a set that one process read, none twice and none unreadable.

    x: (r, F) fp32 on the CPU. labels: (r,) int64. ids: (r,) int64, their numbers in the set, ascending. z: (r, D) what
    leaves the head, where it was asked for.
    """

    x: Tensor
    labels: Tensor
    ids: Tensor
    z: Tensor | None = None


def extract_shard(encoder: nn.Module, source: Source, how: FeatureExtractor, head: bool = False) -> Features:
    """Features of this process's part of a set, with ``head`` also what leaves the head, from the same pass.

    Every process has to call.
    """
    loader, rank = how.loader(source), distributed.rank()
    sampler: Any = loader.batch_sampler
    sizes = [len(keys) for keys in sampler]
    found: list[Tensor] = []
    labels, ids = torch.empty(2, sum(sizes), dtype=torch.int64)
    at = 0
    what = "both" if head else "features"
    passes = _passes(encoder, loader, how.device, how.mean, how.std, what, how.amp, how.note)
    for step, (made, batch) in enumerate(passes):
        if not step:  # a list of parts and its cat would hold everything twice
            found = [torch.empty(sum(sizes), rows.shape[1]) for rows in made]
        place = step * sampler.batch + rank * sizes[step] + torch.arange(sizes[step])
        real = (place < len(source)) & (batch["bad"] < 0)  # the last step repeats images to be divisible
        rows = slice(at, at := at + int(real.sum()))
        labels[rows], ids[rows] = batch["label"][real], place[real]
        for x, one in zip(found, made, strict=True):
            x[rows] = one.cpu()[real]
    x, *z = (x[:at] for x in found)
    return Features(x, labels[:at], ids[:at], *z)


def gathered(share: Features, device: torch.device) -> Features:
    """The shares of all processes in the set's order, on every process, for sets that fit; all have to call."""
    counts = distributed.all_gather(torch.tensor([len(share.ids)], device=device)).tolist()
    most = max(counts)
    whole = torch.cat([torch.arange(count) + rank * most for rank, count in enumerate(counts)])

    def gather(x: Tensor) -> Tensor:
        padded = x.new_zeros(most, *x.shape[1:])
        padded[: len(x)] = x
        return distributed.all_gather(padded.to(device)).cpu()[whole]

    ids, order = gather(share.ids).sort()
    z = None if share.z is None else gather(share.z)[order]
    return Features(gather(share.x)[order], gather(share.labels)[order], ids, z)


class Unread:
    """A note (see :class:`FeatureExtractor`) that marks the unreadable images of ``source``, around another one."""

    def __init__(self, source: Source, device: torch.device, note: Note | None) -> None:
        self.source, self.note = source, note
        self._bad = torch.zeros(len(source), dtype=torch.int64, device=device)

    def __call__(self, batch: dict[str, Tensor], source: Source) -> None:
        if source is self.source:
            self._bad[batch["bad"][batch["bad"] >= 0].to(self._bad.device)] = 1
        if self.note is not None:
            self.note(batch, source)

    def readable(self) -> Tensor:
        """(n,) bool on the CPU: not marked by any process; every process has to call."""
        return (distributed.sum_over_ranks(self._bad) == 0).cpu()


def describe_unread(unread: int, images: int) -> str:
    """The end of a line about a measure; empty where every image counts."""
    return f"; {unread} of {images} images cannot be read and are not counted" * bool(unread)


def read_set(encoder: nn.Module, source: Source, how: FeatureExtractor) -> Features:
    """Features of a whole set on every process, for sets that fit; every process has to call."""
    marks = Unread(source, how.device, how.note)
    x, labels = extract(encoder, how.loader(source), how.device, how.mean, how.std, amp=how.amp, note=marks)
    ids = marks.readable().nonzero()[:, 0]
    return Features(x, labels, ids) if len(ids) == len(x) else Features(x[ids], labels[ids], ids)


@torch.no_grad()
def extract(
    encoder: nn.Module,
    loader: Any,
    device: torch.device,
    mean: Numbers,
    std: Numbers,
    what: str = "features",
    amp: torch.dtype | None = None,
    note: Note | None = None,
) -> tuple[Tensor, Tensor]:
    """What the frozen encoder makes of a labelled set, on the CPU: (n, F) fp32 and labels (n,), in the set's order.

    Args:
        loader: batches of :class:`moco.data.Labelled` whose sampler neither shuffles nor drops; with several
            processes each computes its share and all receive everything.
        what: "features" is what enters the head, "output" what leaves it.
        amp: the encoder's arithmetic, None for fp32.
        note: called with every batch of this process and its source, for instance to count unreadable images.
    """
    n, at = len(loader.dataset), 0  # the last step may repeat images so that every process has as many
    x, labels = torch.empty(0), torch.empty(n, dtype=torch.int64)
    for (made,), batch in _passes(encoder, loader, device, mean, std, what, amp, note):
        rows = distributed.all_gather(made).cpu()
        x = x if at else torch.empty(n, rows.shape[1])  # a list of parts and its cat would hold everything twice
        mine = slice(at, min(n, at + len(rows)))
        x[mine] = rows[: n - at]
        labels[mine] = distributed.all_gather(batch["label"].to(device)).cpu()[: n - at]
        at += len(rows)
    return x, labels


@torch.no_grad()
def _passes(
    encoder: nn.Module, loader: Any, device: torch.device, mean: Numbers, std: Numbers, what: str,
    amp: torch.dtype | None, note: Note | None,
) -> Iterator[tuple[tuple[Tensor, ...], dict[str, Tensor]]]:  # fmt: skip
    """Each batch of this process after what the encoder makes of it, (N, F) fp32; the encoder's mode is put back.

    ``what``: "features", "output", or "both" of them.
    """
    compute: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
        "features": lambda images: (features(encoder, images),), "output": lambda images: (encoder(images),),
        "both": lambda images: around_head(encoder, images),
    }  # fmt: skip
    # Running statistics are each process's own; all embed with the main one's, which is what a checkpoint holds.
    distributed.broadcast_buffers(list(encoder.buffers()))
    training = encoder.training
    encoder.eval()
    try:
        for batch in loader:
            if note is not None:
                note(batch, loader.dataset.source)
            images = normalise(batch["image"].to(device, non_blocking=True), mean, std)
            with torch.autocast(device.type, amp, enabled=amp is not None):
                made = compute[what](images)
            yield tuple(x.float() for x in made), batch
    finally:
        encoder.train(training)


# -------------------------------------------------------------------------------------------------- neighbours


def labelled_sets(sources: Sources) -> tuple[Source, Source]:
    """The bank and the queries of a data set; one and the same source when only one has labels.

    Raises:
        UserError: nothing is labelled.
    """
    if sources.train is not None and sources.val is not None:
        return sources.train, sources.val
    if sources.pretrain.labels is None:
        raise UserError(f"{sources.pretrain.name} has no labels: neighbours vote for classes, give class folders.")
    return sources.pretrain, sources.pretrain


def evaluate_knn(
    encoder: nn.Module, train: Source, val: Source, how: FeatureExtractor, *, k: Sequence[int] = (200,),
    temperature: float = 0.1, queries: Features | None = None,
) -> dict[int, float]:  # fmt: skip
    """Percent of ``val`` whose class the k nearest images of ``train`` vote for, for every k, in one pass.

    Every process takes a share of the images and of the queries; all of them must call and all get the result.
    Unreadable images neither vote nor count.

    Args:
        encoder: any network of :func:`moco.models.encoder.build_encoder`; its mode is put back.
        train, val: labelled sources with the same classes. One object for both: an image is not its own neighbour.
        how: see :class:`FeatureExtractor`.
        k, temperature: as in :func:`knn_predict`.
        queries: this process's share of ``val``, if it was read already.

    Raises:
        UserError: a set that is both bank and queries holds a single image.
    """
    assert train.labels is not None and val.labels is not None
    if train is val and len(train) < 2:
        raise UserError(f"{train.name} holds one image, which has no neighbour; give more, or held-out ones.")
    bank = extract_shard(encoder, train, how)
    if queries is None:
        queries = bank if train is val else extract_shard(encoder, val, how)
    predicted = knn_predict(
        bank.x, bank.labels, queries.x, k=k, temperature=temperature,
        num_classes=int(max(train.labels.max(), val.labels.max())) + 1,
        ids=bank.ids, own=bank.ids if train is val else None, device=how.device,
    )  # fmt: skip
    hits = (predicted == queries.labels).sum(1)
    counts = torch.cat([hits, torch.tensor([len(queries.labels)])]).to(how.device)
    *right, m = distributed.sum_over_ranks(counts).tolist()
    return {one: 100.0 * hit / m for one, hit in zip(k, right, strict=True)}


def knn_values(found: dict[int, float]) -> dict[str, float]:
    """Accuracies by the names under which they are logged: ``knn`` is of the first k, ``knn_20`` of k = 20."""
    first = next(iter(found.values()))
    return {"knn": first, **({f"knn_{k}": value for k, value in found.items()} if len(found) > 1 else {})}


def measure(
    encoder: nn.Module, train: Source, val: Source, how: FeatureExtractor, k: Sequence[int], temperature: float
) -> tuple[dict[str, float], dict[str, Any], str]:
    """:func:`evaluate_knn` as numbers for a log, settings for a result file, and a line to read."""
    marks = Unread(val, how.device, how.note)
    found = evaluate_knn(encoder, train, val, replace(how, note=marks), k=k, temperature=temperature)
    unread = int((~marks.readable()).sum())
    asked = {"k": k[0], "T": temperature, "leave_one_out": train is val, "val_images": len(val) - unread}
    asked["unreadable"] = unread
    percent, ks = "/".join(f"{value:.3f}" for value in found.values()), "/".join(map(str, found))
    alone = ", each image against the others" * (train is val)
    summary = f" * k-NN {percent} (k={ks}, T={temperature}, cosine, encoder features{alone})"
    return knn_values(found), asked, summary + describe_unread(unread, len(val))


@torch.no_grad()
def knn_predict(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    k: Sequence[int],
    temperature: float,
    num_classes: int,
    ids: Tensor | None = None,
    own: Tensor | None = None,
    device: torch.device | None = None,
    chunk: int = 1 << 24,
) -> Tensor:
    """The weighted vote of the k most similar bank images, (len(k), m) int64 on the CPU.

    Cosine similarity s on l2-normalised features; each neighbour gives exp(s / T) to its class, the class with the most
    wins, the lower number when two are equal (InstDisc, arXiv 1805.01978, section 3.4). Of bank images that are equally
    similar the one with the lower number is nearer.

    With several processes each gives its shard of the bank and its own queries, and gets the votes of all shards on
    its queries.

    Args:
        bank, labels: (n, F), (n,) int64.
        queries: (m, F).
        k: numbers of neighbours; a smaller bank votes as a whole.
        num_classes: C; labels are below it.
        ids: (n,) ascending numbers of the bank's images over all processes; None for 0..n-1.
        own: (m,) numbers of the queries where they are in the bank themselves: those do not vote on themselves.
        device: where to compute, by default where the queries are.
        chunk: similarities that exist at one time; bounds the memory, not the result.
    """
    device = queries.device if device is None else device
    ids = torch.arange(len(bank)) if ids is None else ids
    codes = (ids * num_classes + labels.to(ids.device)).to(device)  # one number for image and class
    wanted = max(k) + (own is not None)
    rows = -(-QUERY_ROWS // distributed.world_size())
    most = int(distributed.all_gather(torch.tensor([len(queries)], device=device)).max())
    answers = [torch.empty(len(k), 0, dtype=torch.int64)]
    for start in range(0, most, rows):
        mine = queries[start : start + rows]
        padded = torch.zeros(min(rows, most - start), queries.shape[1], device=device)
        padded[: len(mine)] = F.normalize(mine.to(device), dim=1)
        s, code = _nearest(distributed.all_gather(padded), bank, codes, wanted, chunk)
        s, code = _merged(s, code)
        if own is not None:
            me = torch.zeros(len(s), 1, dtype=torch.int64)
            me[: len(mine), 0] = own[start : start + rows]
            s = s.masked_fill(code // num_classes == me.to(device), -torch.inf)
            s, code = _first(s, code, max(k))
        answers.append(_vote(s, code % num_classes, k, temperature, num_classes)[:, : len(mine)].cpu())
    return torch.cat(answers, 1)


def _nearest(queries: Tensor, bank: Tensor, codes: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """Similarities and codes of each query's k nearest rows of the bank, (m, k) each, the nearest first.

    A smaller bank leaves similarities of minus infinity at the end.
    """
    best = queries.new_full((len(queries), k), -torch.inf)
    code = torch.zeros(len(queries), k, dtype=torch.int64, device=queries.device)
    rows = max(1, min(len(bank), BANK_ROWS, chunk))
    for start in range(0, len(bank), rows):
        part = F.normalize(bank[start : start + rows].to(queries.device), dim=1)
        numbers = codes[start : start + rows]
        for mine in torch.arange(len(queries)).split(max(1, chunk // rows)):
            here = slice(int(mine[0]), int(mine[-1]) + 1)
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
