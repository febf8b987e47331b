"""Two-way validation: how well features find and group their classes, before the projection head and behind it.

    python -m moco.retrieval CHECKPOINT DIR [flags]        --help lists the flags

Each image asks all others, by cosine similarity. With R the number of others of its class:

    precision@1   share of queries whose nearest image is of their class
    R-precision   share of the R nearest that are of the query's class
    mAP@R         1/R sum_{i<=R} [i-th is of the class] * (share of the class among the i nearest)

(Musgrave et al., arXiv 2003.08505, section 4.1; means over queries, images that are alone in their class ask nothing.)
AMI and NMI compare the classes with k-means clusters, as many as classes, of the l2-normalised features. The numbers
go to retrieval.json in --out. Exit codes: 0 done; 2 input that cannot be used.

Legend: n images, F feature width, C width behind the head, r queries of a part, M the largest R.
"""

from __future__ import annotations

import re
import sys
from argparse import Namespace

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score
from torch import Tensor, nn

from moco import distributed, embed, options, probe
from moco.errors import UserError
from moco.pretrained import PUBLISHED, head_entries, open_file

CHUNK = 1 << 24  # similarities at a time, 67 MB
RESTARTS = 3  # of k-means


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return distributed.launch(worker, options.parse_retrieval(argv))


def worker(args: Namespace) -> int:
    """One process of the command, from data to retrieval.json; returns the exit code."""
    embed.make_folder(args.out)
    found = embed.read(args)
    if distributed.is_main():
        x, labels = found.share.x, found.share.labels
        check_labels(labels, found.source.name)
        print(f"{len(x)} images of {found.source.name}, {args.arch} at {found.size} px: {found.words}")
        head = None if args.checkpoint.startswith(PUBLISHED) else read_head(found.encoder, args.checkpoint)
        result = {"features": measure(x, labels, args.seed)}
        if head is not None:
            with torch.no_grad():
                result["head"] = measure(head(x), labels, args.seed)
        else:
            print("the file has no projection head of linear layers: features alone are measured")
        settings = {"arch": args.arch, "checkpoint": args.checkpoint, "images": len(x), "seed": args.seed}
        probe.write_result({**settings, **result}, args.out, "retrieval.json")
        for where, values in result.items():
            print(f" * {where}: " + ", ".join(f"{name} {value:.2f}" for name, value in values.items()))
    distributed.barrier()
    return 0


def read_head(encoder: nn.Module, path: str) -> nn.Sequential | None:
    """The file's projection head, one linear layer or several with ReLU between; None for none or another kind.

    MoCo's, SynCo's and ours are the encoder's own last layer, ``fc`` or ``fc.0`` and ``fc.2``.
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


def measure(x: Tensor, labels: Tensor, seed: int) -> dict[str, float]:
    """Every measure in percent, of (n, F) features and (n,) labels."""
    return {**rankings(x, labels), **clusters(x, labels, seed)}


@torch.no_grad()
def rankings(x: Tensor, labels: Tensor, chunk: int = CHUNK) -> dict[str, float]:
    """Precision@1, R-precision and mAP@R in percent, see the module.

    Args:
        x: (n, F), of any length but zero. labels: (n,) int64. Some class has two images.
        chunk: similarities in memory at a time.
    """
    x = F.normalize(x, dim=1)
    others = torch.bincount(labels)[labels] - 1  # (n,) R
    queries, most = (others > 0).nonzero()[:, 0], int(others.max())
    place = torch.arange(1, most + 1)
    sums = torch.zeros(3, dtype=torch.float64)
    for rows in queries.split(max(1, chunk // len(x))):
        s = x[rows] @ x.T  # (r, n)
        s[torch.arange(len(rows)), rows] = -torch.inf
        nearest = labels[s.topk(most, dim=1).indices]  # (r, M)
        R = others[rows, None]
        hits = ((nearest == labels[rows, None]) & (place <= R)).double()
        average = (hits.cumsum(1) / place * hits).sum(1) / R[:, 0]
        sums += torch.stack([hits[:, 0].sum(), (hits.sum(1) / R[:, 0]).sum(), average.sum()])
    first, precision, average = (100 * sums / len(queries)).tolist()
    return {"precision_at_1": first, "r_precision": precision, "map_at_r": average}


def clusters(x: Tensor, labels: Tensor, seed: int) -> dict[str, float]:
    """AMI and NMI in percent between the classes and k-means clusters of (n, F) features, the best of 3 starts."""
    found = kmeans(x, len(labels.unique()), seed)
    truth = labels.numpy()
    ami, nmi = adjusted_mutual_info_score(truth, found), normalized_mutual_info_score(truth, found)
    return {"ami": 100.0 * float(ami), "nmi": 100.0 * float(nmi)}


def kmeans(x: Tensor, k: int, seed: int) -> np.ndarray:
    """(n,) cluster numbers of the l2-normalised rows."""
    means = KMeans(k, n_init=RESTARTS, random_state=seed)  # type: ignore[arg-type]  (the stub knows only "auto")
    return means.fit_predict(F.normalize(x, dim=1).numpy())


if __name__ == "__main__":
    sys.exit(main())
