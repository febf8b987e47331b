"""A linear classifier that is trained beside a pretraining, on the features that its steps compute anyway.

It reads what enters the projection head of the query encoder, detached: no gradient enters the encoder, and no random
number is taken, so that the run is the same bit for bit without it. Its accuracy on the batches and, at a validation,
on held-out images says how the features do while the run goes on, without a second pass. It is trained on features that
move and on augmented views, and therefore usually stays below a probe of the frozen encoder.

Legend: N images of this process, V views of each that the query encoder reads, F feature width, C classes, m held-out
images of this process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import distributed
from moco.data import Source
from moco.errors import UserError, one_line
from moco.models.encoder import feature_width, head_of
from moco.train.optimizer_state import checked, finite, kept
from moco.train.optimizers import step_unless, use_fused_optimizer_step

RATE = 1.0  # Adam's, times F: a step then moves the logits alike at every width (docs/experiments.md)
FOLLOW = 0.1  # of the step's mean and variance in the running ones, as in BatchNorm
FLOOR = 1e-5  # added to the variances of features of root mean square 1, as in BatchNorm
MOST_CLASSES = 10_000  # above which it is off unless asked for: at F 2,048 its weights and Adam's take 250 MB
ROWS = 16384  # of held-out features that are classified at a time


class OnlineProbe:
    """The classifier, its optimizer, and the counts for the log.

    Features are brought to a root mean square of 1, each image's, and standardised by running means and variances, as
    a BatchNorm without scale and shift would: one rate then fits networks of all kinds.

    Every tensor of a step is on the device, and the host asks for none of them: sums over the images, of the gradient,
    of features and their squares, of images with labels and of those that were right, lie in one vector, so that
    processes exchange it by one operation a step, and the optimizer's step is called off by the device where the run's
    step was.

    Args:
        encoder: the query encoder on its device; its head is watched.
        labels: (n,) int64 class of every image of the data set, below 0 for none.
        classes: names, for checkpoints. count: C.
    """

    def __init__(self, encoder: nn.Module, labels: Tensor, classes: list[str], count: int) -> None:
        device, width = next(encoder.parameters()).device, feature_width(encoder)
        self.labels, self.classes = labels.clamp(min=-1).to(device), classes
        self.weight = torch.zeros(count, width, device=device, requires_grad=True)
        self.bias = torch.zeros(count, device=device, requires_grad=True)
        self.mean, self.var = torch.zeros(width, device=device), torch.ones(width, device=device)
        self._sizes = count * width + count, width, width, 2
        self._sums = torch.zeros(sum(self._sizes), device=device)
        self._gradient, *self._moments, self._counts = self._sums.split(self._sizes)
        self.weight.grad = self._gradient[: count * width].view(count, width)
        self.bias.grad = self._gradient[count * width :]
        self._rows = 0  # views of this step
        self._logged = torch.zeros(2, dtype=torch.float64, device=device)  # right and labelled images since a log line
        self.optimizer = torch.optim.Adam([self.weight, self.bias], lr=RATE / width)
        use_fused_optimizer_step(self.optimizer)
        self._seen: list[Tensor] = []  # features of the views of this batch
        encoder.get_submodule(head_of(encoder)).register_forward_pre_hook(self._see)

    def _see(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if head.training:  # not where features are measured
            self._seen.append(inputs[0].detach())

    def logits(self, x: Tensor) -> Tensor:
        """(.., C) from features (.., F) of root mean square 1."""
        return F.linear((x - self.mean) * (self.var + FLOOR).rsqrt(), self.weight, self.bias)

    def add(self, ids: Tensor, local: bool = False) -> None:
        """After each batch of a step: add the gradients of its images.

        Args:
            ids: (N,), which images they are.
            local: the last features are of small crops, which are no views of whole objects and are left out.
        """
        del self._seen[len(self._seen) - local :]
        x = _unit_scale(torch.cat([views.flatten(1) for views in self._seen]))  # (V N, F), view by view
        self._seen.clear()
        labels = self.labels[ids].repeat(len(x) // len(ids))
        logits = self.logits(x)
        F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum").backward()
        known = labels >= 0
        right = (logits.detach().argmax(1) == labels) & known
        self._counts += torch.stack([right.sum(), known.sum()])
        self._moments[0] += x.sum(0)
        self._moments[1] += x.square().sum(0)
        self._rows += len(x)

    @torch.no_grad()
    def step(self, bad: Tensor) -> None:
        """After the last batch of a step: move by the mean gradient over the images of all processes, unless the
        run's step was ``bad``, () bool, no image had a label, or the gradient is not finite."""
        gradient, total, squares, counts = distributed.sum_over_ranks(self._sums).split(self._sizes)
        images, rows = counts[1], self._rows * distributed.world_size()
        off = bad | (images == 0) | ~(gradient.sum() + squares.sum()).isfinite()
        self._logged += counts.masked_fill(off, 0.0)
        torch.div(gradient, images.clamp(min=1.0), out=self._gradient)
        step_unless(off, self.optimizer)
        mean = total / rows
        var = (squares / rows - mean.square()).clamp(min=0.0)
        for old, new in ((self.mean, mean), (self.var, var)):
            old.copy_(torch.where(off, old, old.lerp(new, FOLLOW)))
        self._sums.zero_()
        self._rows = 0

    def train_accuracy(self) -> dict[str, float]:
        """Percent of the training views since the last call that were classified correctly before the classifier saw
        them; empty where none had a label. The host waits for it."""
        right, images = self._logged.tolist()
        self._logged.zero_()
        return {"online_acc1": 100.0 * right / images} if images else {}

    @torch.no_grad()
    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        """Percent of held-out images, of which each process has features (m, F) and labels (m,), that are classified
        correctly; every process has to call."""
        device = self.weight.device
        counts = torch.zeros(2, dtype=torch.float64, device=device)
        for rows, truth in zip(x.split(ROWS), labels.split(ROWS), strict=True):
            found = self.logits(_unit_scale(rows.to(device))).argmax(1)
            counts += torch.stack([(found == truth.to(device)).sum(), (truth >= 0).sum().to(device)])
        right, images = distributed.sum_over_ranks(counts).tolist()
        return 100.0 * right / max(images, 1.0)

    # ------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        layer = {"weight": self.weight.detach(), "bias": self.bias.detach(), "mean": self.mean, "var": self.var}
        return {"layer": layer, "optimizer": kept(self.optimizer), "classes": self.classes}

    def load(self, state: dict, path: str) -> str:
        """Go on from a checkpoint's ``online_probe``, or begin anew where it has none or one of other classes or of
        another width, which the sentence that is returned says; empty where it goes on.

        Raises:
            UserError: damaged entries.
        """
        entries = state.get("online_probe")
        if not entries:
            return f"the online probe begins here: {path} has none"
        own, layer = self.state_dict()["layer"], entries["layer"]
        try:
            plain = all(value.layout == torch.strided and value.dtype == torch.float32 for value in layer.values())
            if layer.keys() != own.keys() or not plain or not all(bool(x.isfinite().all()) for x in layer.values()):
                raise ValueError("its weights are not those of a linear layer, or not finite")
            if entries["classes"] != self.classes or any(layer[name].shape != own[name].shape for name in own):
                return f"the online probe begins anew: that of {path} is of other classes"
            self.optimizer.load_state_dict(checked(self.optimizer, finite(entries["optimizer"])))
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{path}: the entry online_probe is damaged ({one_line(error)}); take another checkpoint of that run."
            ) from error
        for name, value in layer.items():
            own[name].copy_(value)
        return ""


def _unit_scale(x: Tensor) -> Tensor:
    """Features (.., F) in fp32 whose root mean square is 1."""
    return F.rms_norm(x.float(), x.shape[-1:])


def begin_probe(
    encoder: nn.Module, images: Source, asked: bool | None, state: dict, path: str | None
) -> tuple[OnlineProbe | None, list[str]]:
    """The probe of a run, None where it has none, and sentences for the log.

    Args:
        asked: by --online-probe; None: where the images have labels.
        state: the checkpoint that the run goes on from, if there is a ``path``.

    Raises:
        UserError: it is asked for and the images have no labels.
    """
    if asked is False:
        return None, []
    count, problem = _classes_of(images)
    if problem and asked:
        raise UserError(f"--online-probe: {problem}; leave it out.")
    if problem:
        return None, []
    if count > MOST_CLASSES and not asked:
        return None, [f"no online probe, as there are {count} classes; --online-probe asks for it"]
    assert images.labels is not None
    probe = OnlineProbe(encoder, torch.from_numpy(images.labels), list(images.classes or ()), count)
    said = [f"online probe: a linear classifier of {count} classes beside the training, which it does not change"]
    return probe, [*said, *filter(None, [probe.load(state, path) if path else ""])]


def _classes_of(images: Source) -> tuple[int, str]:
    """C, or why the images are none for a linear classifier."""
    labels = images.labels
    if labels is None or labels.ndim != 1 or not (labels >= 0).any():
        return 0, f"{images.name} has no labels, one of each image"
    count = max(int(labels.max()) + 1, len(images.classes or ()))
    return count, "" if count > 1 else f"{images.name} has one class"
