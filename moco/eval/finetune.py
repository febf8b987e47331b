"""Fine-tuning on few labels: an encoder and a new linear layer, a learning rate for each, cosine per epoch.

The protocol of Barlow Twins (Zbontar et al., arXiv 2103.03230) as SynCo takes it over: cross-entropy, SGD, random
crops and flips; the encoder is trained too, BatchNorm included, or kept as it is (``freeze``). Other losses, optimizers
and schedules are a :class:`moco.eval.finetune_loss.Objective` and a :class:`moco.train.plan.TrainPlan` away.

Legend: N images on this process, C classes, B images of a step in all.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moco import distributed, files, run_folder
from moco.errors import TrainingError
from moco.eval.classifier import (
    Classifier,
    Score,
    check_frozen,
    check_state,
    counted_once,
    fill,
    filling_optimizer,
    predictions_of,
    score_sums,
)
from moco.eval.features import LabelledBatches, TooManyUnreadError
from moco.eval.finetune_loss import Objective
from moco.models.base import StepOutput
from moco.models.buffers import Small
from moco.models.ema import update_unless
from moco.train import checkpoint
from moco.train.loop import Loop
from moco.train.metrics import Mean, without_top5
from moco.train.optimizer_state import finite
from moco.weights.settings import images_of

# The released code's names; they lie beside a probe's files and a pretraining's without harm.
CHECKPOINT, BEST, RESULT = "checkpoint_semisup.pth.tar", "model_best_semisup.pth.tar", "result.json"
KEPT = "checkpoint_semisup_{:04d}.pth.tar"  # of an epoch, counted from 0 as upstream's are
# see checkpoint.reserve_run_folder
TUNING_FILES = (CHECKPOINT + run_folder.PREVIOUS, CHECKPOINT), (RESULT,), (BEST, KEPT.replace("{:04d}", "[0-9]*"))


# ---------------------------------------------------------------------------------------------------- evaluation


def evaluate(model: Classifier, images: LabelledBatches, predictions: bool = False) -> Score:
    """Accuracy in eval mode, each image that can be read counted once. BatchNorm's statistics are the main process's,
    which are those of checkpoints.

    Args:
        predictions: also keep what was predicted for each image.

    Raises:
        TooManyUnreadError: above :func:`moco.eval.features.most_unreadable`.
    """
    return images.whole(lambda: _evaluate(model, images, predictions))


@torch.no_grad()
def _evaluate(model: Classifier, images: LabelledBatches, predictions: bool) -> Score:
    distributed.broadcast_buffers(list(model.buffers()))
    model.eval()
    n, device = images.sampler.n, distributed.device()
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    batches = ((batch["image"], batch["label"], batch["bad"] < 0) for batch in images.batches(0))
    parts, missing = list[Tensor](), list[int]()
    for pixels, labels, rows in counted_once(batches, n, missing):
        logits = model(pixels[rows].to(device)) if len(rows) else torch.zeros(0, model.classes, device=device)
        if len(rows):
            sums += score_sums(logits, labels[rows].to(device))
        if predictions:
            whole = torch.zeros(len(pixels), model.classes, device=device)
            whole[rows] = logits
            parts.append(distributed.all_gather(predictions_of(whole, labels.to(device), rows.to(device))).cpu())
    found = torch.cat(parts) if parts else None
    images.judge(missing)
    return Score.of(sums, n, model.classes, None if found is None else found[found[:, 0] >= 0])


# ------------------------------------------------------------------------------------------------------ training


@dataclass
class Tuner(Loop):
    """A fine-tuning: its loss, its reports and its checkpoints. ``about`` is what a checkpoint says of the run,
    ``ema`` of :func:`moco.models.ema.moving_average`; ``frozen`` are the tensors that ``freeze`` keeps.

    Differences from pretraining that are meant: rates are shares of each group's own; a step that is not finite ends
    the run at once; an epoch has ended when it is evaluated; on a CPU the optimizer has the form of the released code,
    which the fused one equals to rounding.
    """

    model: Classifier
    about: dict[str, Any]
    objective: Objective
    lrs: list[float]  # of the optimizer's groups; a file that goes on has those of its last step in them
    ema: Any = None
    frozen: dict[str, Tensor] = field(default_factory=dict)
    arch: str = ""  # name of the encoder, for checkpoints
    details: bool = False  # keep the predictions of the last epoch's evaluation

    def __post_init__(self) -> None:
        self.plan = self.plan.as_shares(max(self.lrs))
        super().__post_init__()
        self.scales = self.lrs
        self.meters: dict[str, Mean] = {}
        self.small = Small(self.model)  # BatchNorm's statistics, the only thing besides the weights that a step changes
        self.score: Score | None = None  # of the last epoch that was trained here
        self.images: LabelledBatches | None = None  # that were trained on here

    @property
    def evaluated(self) -> Classifier:
        """The network that is evaluated and handed on: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    def finished(self) -> bool:
        """Whether all epochs are done, with their evaluation."""
        return self.progress.epoch >= self.plan.epochs

    def run_epoch(self, images: LabelledBatches, selecting: LabelledBatches) -> None:
        """:meth:`train_epoch` with the rest of the epoch's images, then, unless the run must stop, its evaluation on
        the images ``selecting`` and the check of what is frozen."""
        at, self.images = self.progress, images
        at.draw = self.position
        self.train_on(images.loader, lambda: images.batches(at.epoch, at.batch))
        if self.exit_code is not None:
            return
        try:
            self.score = evaluate(self.evaluated, selecting, self.details and at.epoch == self.plan.epochs - 1)
        except TooManyUnreadError:
            self.save()  # the epoch, which a resumed run evaluates
            raise
        self.check_frozen()
        at.close_epoch()
        if self.score.acc1 > at.best_acc1 or not at.best_epoch:
            at.best_acc1, at.best_epoch = self.score.acc1, at.epoch
        self.plateau.note(self.score.acc1)

    def check_frozen(self) -> None:
        """With ``freeze``: see :func:`moco.eval.classifier.check_frozen`."""
        if self.model.freeze:
            check_frozen(self.model.encoder, self.frozen, "--weights freeze keeps", "the encoder that was read")

    # ------------------------------------------------------------------------------------------------- a step

    @property
    def position(self) -> int:
        """Batches since the start."""
        return self.progress.batches(self.plan.batches)

    def settle_optimizer(self) -> None:
        """The optimizer's form on this device, also where a file of another device had its own."""
        if self.device.type != "cpu":
            super().settle_optimizer()
        elif "fused" in self.optimizer.defaults:
            for group in self.optimizer.param_groups:
                group.update({name: self.optimizer.defaults[name] for name in ("fused", "foreach")})

    def before_step(self) -> None:
        """Remember BatchNorm's statistics."""
        self.restore = self.small.snapshot()

    def to_device(self, batch: dict) -> dict[str, Tensor]:
        """Images, their labels and numbers."""
        return {name: batch[name].to(self.device, non_blocking=True) for name in ("image", "label", "index")}

    def forward(self, here: dict[str, Tensor]) -> StepOutput:
        """The objective's output."""
        at = self.progress
        return self.objective(self.model.prepare, self.wrapped, here, at.seed, at.draw, distributed.rank())

    def after_move(self) -> None:
        """BatchNorm's statistics stay and the moving average follows where the step was taken."""
        self.restore(self.bad)
        if self.ema is not None:
            update_unless(self.bad.float(), self.ema, self.model)

    def remember(self) -> Callable[[], None]:
        """With the means that the next report is of."""
        put_back, meters = super().remember(), {name: copy.copy(mean) for name, mean in self.meters.items()}

        def put_all_back() -> None:
            put_back()
            self.meters = meters

        return put_all_back

    def count(self, norm: Tensor) -> None:
        """Add the losses and what they are made of."""
        for output in self.last_outputs:
            for name, value in {"loss": output.loss, **output.statistics}.items():
                self.meters.setdefault(name, Mean()).add(value)

    def after_step(self, before: int) -> None:
        """Report each ``print_freq`` batches and at the end of an epoch."""
        at, every = self.progress, self.plan.print_freq
        if at.batch // every > before // every or at.batch == self.plan.batches:
            self.sync_outcomes()
            if self.away:
                return
            self._report()
            self.meters = {}
            self.watch.restart()

    def note_bad_step(self, step: int, newest: bool, bad_loss: bool) -> None:
        """Always raises a TrainingError: the published protocols have no such steps."""
        what = "the loss" if bad_loss else "a gradient"
        raise TrainingError(
            f"epoch {self.progress.epoch}, step {step}: {what} is not finite and the step was not taken; lower "
            "--lr-backbone or --lr-classifier, then go on from the last checkpoint or start anew."
        )

    # --------------------------------------------------------------------------------------------------- reports

    def _report(self) -> None:
        at, meters, steps = self.progress, self.meters, self.plan.batches
        here = torch.tensor([meter.value for meter in meters.values()], device=distributed.device())
        values = dict(zip(meters, distributed.mean_over_ranks(here).tolist(), strict=True))
        terms = [entry for entry in values.items() if entry[0] not in ("loss", "train_acc1", "train_acc5")]
        top5 = f" Acc@5 {values['train_acc5']:.2f}" if "train_acc5" in values else ""
        speed, wait = self.watch.rates()
        groups = self.optimizer.param_groups
        head = {id(p) for p in self.model.head}
        rates = [[g["lr"] for g in groups if (id(g["params"][0]) in head) == first] for first in (True, False)]
        rates = {"lr_classifier": max(rates[0]), **({"lr_backbone": max(rates[1])} if rates[1] else {})}
        values |= {**rates, "images_per_second": speed, "wait_share": wait}
        text = (
            f"Epoch: [{at.epoch}][{at.batch:4d}/{steps}] loss {values['loss']:.4f} "
            f"{''.join(f'{name} {value:.4f} ' for name, value in terms)}Acc@1 {values['train_acc1']:.2f}{top5} "
            f"lr {' '.join(f'{rate:.4g}' for rate in rates.values())} {speed:.0f} images/s wait {wait:.0%}"
        )
        self.log.scalars(self.position, values, text=text)

    def end_epoch(self, which: str) -> None:
        """Record the evaluation of the epoch that has ended, on the images called ``which``, and save: last, so that a
        run that is killed between the two repeats both."""
        at, score = self.progress, self.score
        if score is not None and self.exit_code is None:
            best = f"(best {at.best_acc1:.3f} after {at.best_epoch} epoch{'s' * (at.best_epoch != 1)})"
            text = f"epoch {at.epoch - 1}: {which} {score} {best}{score.left_out}"
            values = {**score.values(which), "best_acc1": at.best_acc1}
            self.log.scalars(self.position, values, finished_epochs=at.epoch, text=text)
        self.save()

    def result(self, val: Score | None, test: Score | None) -> dict[str, Any]:
        """What result.json says of the last epoch's network, and of the best epoch by the images it was chosen on.

        Of the images so many were counted, ``unreadable`` more could not be read; of those that were trained on,
        ``train_unreadable`` were replaced by others. Sweeps know these names from moco/sweep/figures.py. Every process
        has to call.
        """
        at = self.progress
        values: dict[str, Any] = {"epochs": at.epoch, "best_epoch": at.best_epoch, **without_top5(self.model.classes)}
        if val is not None:
            values |= {"val_acc1": val.acc1, "val_acc5": val.acc5, "val_loss": val.loss, "best_val_acc1": at.best_acc1}
        elif test is not None:
            values["best_acc1"] = at.best_acc1
        if test is not None:
            values |= {"acc1": test.acc1, "acc5": test.acc5, "loss": test.loss}
        scores = {"val": val, "test": test}
        values |= {f"{name}_images": score.images if score else 0 for name, score in scores.items()}
        replaced = {"train_unreadable": self.images.count_bad()} if self.images else {}
        return values | {"unreadable": sum(score.unread for score in scores.values() if score), **replaced}

    # ------------------------------------------------------------------------------------------------ checkpoints

    def save(self) -> None:
        """Write upstream's dictionary and ``run``, what a resumed run needs besides; also as the best one if it is, and
        once more where the plan keeps this epoch's.

        ``state_dict`` is what was evaluated. With a moving average the weights that are trained are ``trained``.
        """
        self.saver.restart()
        distributed.by_main(self._write)
        self.saved = self.place

    def _write(self) -> None:
        at, encoder = self.progress, self.model.encoder
        run = {
            "seed": at.seed,
            "batch": at.batch,
            "best_epoch": at.best_epoch,
            **self.about,
            "plateau": self.plateau.state_dict(),
            **images_of(encoder, self.model.mean, self.model.std, self.about),
        }
        if "pretraining" in run and not self.model.freeze:
            data = {"name": self.about["data"]["name"]} if "data" in self.about else {"name": "not recorded"}
            run["pretraining"] = {**run["pretraining"], "finetuned": {**data, "epochs": at.epoch}}
        state = checkpoint.pack(self.evaluated.encoder, self.optimizer, self.scaler, self.arch, at.epoch, run)
        state["best_acc1"] = at.best_acc1
        if self.ema is not None:
            state["trained"] = checkpoint.prefixed(encoder.state_dict())
        more = []
        if not at.batch and self.score is not None:
            state["acc1"] = self.score.acc1  # of this epoch; moco.average chooses by it
            kept = self.plan.keep_every and at.epoch % self.plan.keep_every == 0
            more = [BEST] * (at.best_epoch == at.epoch) + [KEPT.format(at.epoch - 1)] * bool(kept)
        last = self.away or self.exit_code is not None or self.finished()
        self.saver.write(state, partial(self._write_files, more), last)

    def _write_files(self, more: list[str], state: dict) -> None:
        folder = self.saver.folder
        for name in more:
            files.write(state, os.path.join(folder, name))
        checkpoint.save_one(state, os.path.join(folder, CHECKPOINT), self.saver.own)


def load(
    state: dict, path: str, arch: str, model: Classifier, ema: Any,
    optimizer: torch.optim.Optimizer | None, scaler: torch.amp.GradScaler,
) -> None:  # fmt: skip
    """Put a checkpoint of this program, or of SynCo's, back; without an optimizer its network alone, to be evaluated.

    Raises:
        UserError: another kind of file, architecture or network.
    """
    check_state(state, path, arch, *([] if optimizer is None else ["optimizer"]))  # an average of checkpoints has none
    if ema is not None or optimizer is None:
        fill((model if ema is None else ema.module).encoder, state, path)
    if optimizer is None:
        return
    fill(model.encoder, state, path, "trained" if "trained" in state else "state_dict")
    with filling_optimizer(path):
        optimizer.load_state_dict(finite(state["optimizer"]))
        if state.get("scaler"):  # empty when the run so far did not scale its loss
            scaler.load_state_dict(state["scaler"])
