"""Retrieval and clustering metrics: how well features find and group classes, before and behind the projection head.

    python -m moco.retrieval CHECKPOINT DIR [flags]        --help lists the flags

Each image asks all others, by cosine similarity. With R the number of others of its class:

    precision@1   share of queries whose nearest image is of their class
    R-precision   share of the R nearest that are of the query's class
    mAP@R         1/R sum_{i<=R} [i-th is of the class] * (share of the class among the i nearest)
    mAP           the same sum over all others in place of the R nearest

(Musgrave et al., arXiv 2003.08505, section 4.1; means over queries, images that are alone in their class ask nothing.)
AMI and NMI compare the classes with k-means clusters, as many as classes, of the l2-normalised features. The numbers
go to retrieval.json in --out. Exit codes: 0 done; 2 input that cannot be used.

main_pretrain.py --retrieval-every measures the same between epochs, see :func:`both_ways`.

Legend: n images, F feature width, D width behind the head, r queries of a part.
"""

from __future__ import annotations

import math
import re
import warnings
from argparse import Namespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import bars, distributed
from moco.errors import UserError, tell
from moco.eval import embed, linear
from moco.eval.features import Features, gathered
from moco.seeding import torch_generator
from moco.weights.layouts import PUBLISHED, head_entries, open_file

MEASURES = ("precision_at_1", "r_precision", "map_at_r", "map", "ami", "nmi")
CHUNK = 1 << 22  # similarities at a time, 17 MB, and six times that beside them
RESTARTS = 3  # of k-means
MOST_IMAGES = 10_000  # images between epochs: time grows with their square, and k-means holds up all processes


def retrieval_worker(args: Namespace) -> int:
    """One process of the command, from data to retrieval.json; returns the exit code."""
    found = embed.read_features(args, args.out)
    x, labels = found.share.x, found.share.labels
    check_labels(labels, found.source.name)
    say = tell if distributed.is_main() else lambda _: None
    say(
        f"{len(x)} images of {found.source.name}, {args.arch} at {found.size} px: {found.summary}{found.share.left_out}"
    )
    head = None if args.checkpoint.startswith(PUBLISHED) else read_head(found.encoder, args.checkpoint)
    result = {"features": measure_retrieval(x, labels, args.seed)}
    if head is None:
        say("the file has no projection head of linear layers: features alone are measured")
    else:
        with torch.no_grad():
            result["head"] = measure_retrieval(head(x), labels, args.seed)
    settings = {"arch": args.arch, "checkpoint": args.checkpoint, "images": len(x), "unreadable": found.share.unread,
                "seed": args.seed}  # fmt: skip
    linear.write_result({**settings, **result}, args.out, "retrieval.json")
    for where, values in result.items():
        say(f" * {where}: " + describe_measures(values))
    return 0


def describe_measures(values: dict[str, float]) -> str:
    """The measures in a line."""
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items())


def both_ways(share: Features, seed: int) -> tuple[dict[str, float], str]:
    """The measures of held-out images before the head and behind it, ``features/ami`` and so on, and lines to read.

    Of more than MOST_IMAGES images a drawn part is measured, the same one every time. Features that are not finite
    give NaN: a measure ends no run.

    Args:
        share: this process's images, with z, of :meth:`moco.eval.features.FeatureExtractor.shard`; every process has
            to call.
        seed: of the part and of k-means.
    """
    whole = gathered(share, distributed.device())
    assert whole.z is not None
    n = len(whole.ids)
    part = torch.randperm(n, generator=torch_generator("retrieval", seed))[:MOST_IMAGES].sort().values
    drawn = f", drawn from {n}" * (n > MOST_IMAGES)
    values, lines = {}, [f"retrieval among {len(part)} held-out images{drawn}{whole.left_out}"]
    for where, x in (("features", whole.x[part]), ("head", whole.z[part])):
        finite = bool(x.isfinite().all())
        found = measure_retrieval(x, whole.labels[part], seed) if finite else {name: math.nan for name in MEASURES}
        values.update({f"{where}/{name}": value for name, value in found.items()})
        lines.append(f"   {where}: " + describe_measures(found))
    return values, "\n".join(lines)


def read_head(encoder: nn.Module, path: str) -> nn.Sequential | None:
    """The file's projection head, one linear layer or several with ReLU between; None for none or another kind.

    MoCo's, SynCo's and ours are the encoder's own last layer, ``fc`` or ``fc.0`` and ``fc.2``.

    Raises:
        UserError: unreadable, or odd tensors.
    """
    entries = head_entries(encoder, open_file(path))
    layers: list[nn.Module] = []
    for name in sorted(entries, key=lambda name: (len(name), name)):
        value = entries[name]
        if not re.fullmatch(r"(\d+\.)?(weight|bias)", name) or (name.endswith("weight") and value.ndim < 2):
            return None
        if name.endswith("weight"):
            bias = entries.get(name.removesuffix("weight") + "bias")
            layer = nn.Linear(value.shape[1], value.shape[0], bias=bias is not None)
            layer.load_state_dict({"weight": value.flatten(1), **({} if bias is None else {"bias": bias})})
            layers += [nn.ReLU(), layer] if layers else [layer]
    return nn.Sequential(*layers).eval() if layers else None


def check_labels(labels: Tensor, name: str) -> None:
    """UserError unless some class has two images and there are two classes."""
    counts = torch.bincount(labels.clamp_min(0))
    if int(labels.min()) < 0 or int((counts > 0).sum()) < 2 or int(counts.max()) < 2:
        raise UserError(f"{name} needs class folders, two at least, and two images in one: retrieval is by class.")


def measure_retrieval(x: Tensor, labels: Tensor, seed: int) -> dict[str, float]:
    """Every measure in percent, of (n, F) features and (n,) labels, which every process has; all have to call."""

    def own() -> tuple[dict[str, float] | None, Tensor]:
        return clusters(x, labels, seed) if distributed.is_main() else None, rankings(x, labels)

    grouped, sums = distributed.wait_without_timeout(own)
    sums = distributed.sum_over_ranks(sums.to(distributed.device()))
    queries = (torch.bincount(labels)[labels] > 1).sum()
    ranked = dict(zip(MEASURES, (100 * sums / queries).tolist(), strict=False))
    return {**ranked, **distributed.from_main(grouped)}


@torch.no_grad()
def rankings(x: Tensor, labels: Tensor) -> Tensor:
    """Sums of precision@1, R-precision, AP@R and AP, (4,), see the module, over this process's share of the queries.

    x: (n, F), of any length but zero. labels: (n,) int64. Some class has two images.
    """
    x = F.normalize(x, dim=1)
    others = torch.bincount(labels)[labels] - 1  # (n,) R
    queries = (others > 0).nonzero()[:, 0]
    place = torch.arange(1, len(x)).double()
    sums = torch.zeros(4, dtype=torch.float64)
    parts = queries[distributed.rank() :: distributed.world_size()].split(max(1, CHUNK // len(x)))
    for rows in bars.counted(parts, len(parts), "rankings"):
        s = x[rows] @ x.T  # (r, n)
        s[torch.arange(len(rows)), rows] = -torch.inf
        order = torch.from_numpy(np.argsort(-s.numpy(), axis=1))[:, :-1]  # numpy sorts in a quarter of torch's time
        R = others[rows, None].double()
        hits = labels[order] == labels[rows, None]  # (r, n - 1)
        average = torch.where(hits, hits.cumsum(1) / place, 0.0) / R
        within = place <= R
        values = [hits[:, :1], (hits & within) / R, average * within, average]
        sums += torch.stack([value.sum(dtype=torch.float64) for value in values])
    return sums


def clusters(x: Tensor, labels: Tensor, seed: int) -> dict[str, float]:
    """AMI and NMI in percent between the classes and k-means clusters of (n, F) features, the best of 3 starts."""
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score  # two seconds of imports

    found, truth = kmeans(x, len(labels.unique()), seed), labels.numpy()
    measures = {"ami": adjusted_mutual_info_score, "nmi": normalized_mutual_info_score}
    return {name: 100.0 * float(measure(truth, found)) for name, measure in measures.items()}


def kmeans(x: Tensor, k: int, seed: int) -> np.ndarray:
    """(n,) cluster numbers of the l2-normalised rows."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    means = KMeans(k, n_init=RESTARTS, random_state=seed % 2**32)  # type: ignore[arg-type]  (the stub knows only "auto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of fewer points than clusters, which AMI tells as well
        return means.fit_predict(F.normalize(x, dim=1).numpy())
