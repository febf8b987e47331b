"""Fine-tuning on few labels: an encoder and a new linear layer, a learning rate for each, cosine per epoch.

The protocol of Barlow Twins (Zbontar et al., arXiv 2103.03230) as SynCo takes it over: cross-entropy, SGD, random
crops and flips; the encoder is trained too, BatchNorm included, or kept as it is (``freeze``). Other losses, optimizers
and schedules are a :class:`moco.eval.finetune_loss.Objective` and a :class:`moco.train.plan.TrainPlan` away.

Legend: N images on this process, C classes, B images of a step in all.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moco import distributed, files
from moco.data import EpochSampler, Source, Sources, open_sources
from moco.errors import TrainingError, UserError
from moco.eval import fewshot
from moco.eval.features import LabelledBatches, describe_unread
from moco.eval.finetune_loss import Objective
from moco.eval.linear import Score, counts, labelled_pair, own_rows
from moco.models.base import StepOutput
from moco.models.batchnorm import has_batchnorm, sync_batchnorm
from moco.models.ema import update_unless
from moco.models.encoder import backbone_keys, head_of, new_classifier
from moco.models.inputs import normalise
from moco.train import checkpoint
from moco.train.loop import Loop
from moco.train.metrics import Mean, describe_top5, without_top5
from moco.train.optimizers import layer_groups
from moco.train.plan import Progress
from moco.train.resume import describe_stop
from moco.weights.changes import restore_changes
from moco.weights.read import fill_network
from moco.weights.settings import images_of

# The released code's names; they lie beside a probe's files and a pretraining's without harm.
CHECKPOINT, BEST, RESULT = "checkpoint_semisup.pth.tar", "model_best_semisup.pth.tar", "result.json"
CHOSEN_ON_TEST = (
    "each epoch is evaluated on the test images: the best one is chosen on them, the last one is not "
    "(--val-share holds training images out to choose on)"
)
KEPT = "checkpoint_semisup_{:04d}.pth.tar"  # of an epoch, counted from 0 as upstream's are


# ------------------------------------------------------------------------------------------------ before a run


def epochs_for(percent: float) -> int:
    """SynCo's published lengths: 60 epochs on 1 % of the labels, 30 on 10 %, 90 on all; a share between two takes the
    smaller one's. A list's share is never round: 12,811 of 1,281,167 names are its 1 %."""
    return 60 if percent < 9.95 else 30 if percent < 99.95 else 90


def labelled_images(sources: Sources, test: bool) -> tuple[Source, Source | None]:
    """The labelled training images, and with ``test`` the test images too; UserError when the data lacks them."""
    if test:
        return labelled_pair(sources)
    train = sources.train or sources.pretrain
    if train.labels is None:
        raise UserError(f"{train.name} has no labels: give class folders, or a list with a TAB and a label a line.")
    return train, None


def novel_images(sources: Sources, path: str, classes: str) -> Source:
    """The images of few-shot episodes: those at ``path``, else the data's held-out ones, whose classes were trained on.

    ``classes`` is as in :func:`moco.eval.fewshot.pool`.
    """
    if path:
        sources = open_sources(path=path, channels=sources.pretrain.channels)
    return fewshot.pool(sources, classes)


def reserve_run_folder(save_dir: str, resumed: str | None, overwrite: bool, evaluate: bool = False) -> None:
    """Refuse a folder that holds another run of this program, or a probe's result; see
    :func:`moco.train.checkpoint.reserve_run_folder`. To evaluate, any folder will do.

    Raises:
        UserError: this run would write over another one.
    """
    if evaluate:
        return
    more = (BEST, KEPT.replace("{:04d}", "[0-9]*"))
    wanted = (save_dir, resumed, overwrite, (CHECKPOINT,), (RESULT,), more)
    distributed.first_on_node(partial(checkpoint.reserve_run_folder, *wanted), wait=True)


# -------------------------------------------------------------------------------------------------- the network


class Classifier(nn.Module):
    """An encoder whose head is a new linear layer: weight normal with deviation .01, bias 0.

    Args:
        encoder: with C outputs.
        mean, std: of the channels.
        seed: of the layer's first weights.
        freeze: only the layer is trained and the encoder stays in eval mode.
        amp: the encoder's arithmetic, None for fp32; the loss is always fp32.
        sync_bn: BatchNorm over the batch of all processes; the encoder's layers are replaced.

    Raises:
        UserError: the encoder's head is not one linear layer with a bias.
    """

    def __init__(
        self,
        encoder: nn.Module,
        mean: Any,
        std: Any,
        seed: int,
        freeze: bool,
        amp: torch.dtype | None = None,
        sync_bn: bool = False,
    ) -> None:
        super().__init__()
        if sync_bn:
            encoder = sync_batchnorm(encoder)
        self.encoder, self.mean, self.std, self.freeze, self.amp = encoder, mean, std, freeze, amp
        self._statistics: dict[torch.device, tuple[Tensor, Tensor]] = {}
        layer = new_classifier(encoder, seed)
        encoder.requires_grad_(not freeze)
        layer.requires_grad_(True)
        self.head = [layer.weight, layer.bias]

    @property
    def classes(self) -> int:
        """C."""
        return self.head[1].shape[0]

    def train(self, mode: bool = True) -> Classifier:
        """As of any module, but a frozen encoder stays in eval mode: its BatchNorm statistics are the file's."""
        return super().train(mode and not self.freeze)

    def prepare(self, images: Tensor) -> Tensor:
        """Normalised fp32 pixels of uint8 images, both (N, channels, h, w)."""
        if images.device not in self._statistics:  # copied there once: a copy from ordinary memory waits for a GPU
            mean, std = (torch.as_tensor(x, dtype=torch.float32, device=images.device) for x in (self.mean, self.std))
            self._statistics[images.device] = mean, std
        mean, std = self._statistics[images.device]
        return normalise(images, mean, std)

    def forward(self, images: Tensor, with_features: bool = False) -> Any:
        """(N, C) fp32 logits of (N, channels, h, w) images, uint8 or prepared, on the model's device; with_features:
        also what enters the layer, (N, F)."""
        pixels = self.prepare(images) if images.dtype == torch.uint8 else images
        caught: list[Tensor] = []
        layer = self.encoder.get_submodule(head_of(self.encoder))
        handle = layer.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
        try:
            with torch.autocast(pixels.device.type, self.amp, enabled=self.amp is not None):
                logits = self.encoder(pixels)
        finally:
            handle.remove()
        return (logits.float(), caught[0].flatten(1).float()) if with_features else logits.float()

    def groups(
        self, lr_classifier: float, lr_backbone: float, weight_decay: float = 0.0, layer_decay: float | None = None
    ) -> list[dict[str, Any]]:
        """Parameter groups in the released code's order: the layer, then the rest if it is trained; with
        ``layer_decay`` those of :func:`moco.train.optimizers.layer_groups`, whose weight decay is per group."""
        if layer_decay is not None:
            return layer_groups(self.encoder, self.head, lr_classifier, lr_backbone, weight_decay, layer_decay)
        head = {id(p) for p in self.head}
        rest = [p for p in self.encoder.parameters() if id(p) not in head]
        groups = [{"params": self.head, "lr": lr_classifier}]
        return groups if self.freeze else [*groups, {"params": rest, "lr": lr_backbone}]

    def backbone(self) -> dict[str, Tensor]:
        """A copy, on the CPU, of every tensor but the layer's."""
        keys = backbone_keys(self.encoder)
        return {name: value.cpu().clone() for name, value in self.encoder.state_dict().items() if name in keys}


# ---------------------------------------------------------------------------------------------------- evaluation


def check_batch(model: Classifier, sampler: EpochSampler) -> None:
    """Refuse batches with which BatchNorm cannot train: one image has no variance.

    Raises:
        UserError: some step of an epoch gives each process a single image.
    """
    sizes = {min(sampler.n, sampler.batch), sampler.n % sampler.batch or sampler.batch}
    if not model.freeze and has_batchnorm(model.encoder) and min(-(-n // sampler.world) for n in sizes) < 2:
        raise UserError(
            f"{sampler.n} training images in batches of {sampler.batch} leave a step with one image a process, too few "
            "for BatchNorm: choose another --batch-size."
        )


@torch.no_grad()
def evaluate(model: Classifier, images: LabelledBatches) -> Score:
    """Accuracy in eval mode, each image that can be read counted once: the last step's repeats, which make the shares
    of all processes equal, are left out. BatchNorm's statistics are the main process's, which are those of checkpoints.
    """
    distributed.broadcast_buffers(list(model.buffers()))
    model.eval()
    device = distributed.device()
    n, world, rank = images.sampler.n, distributed.world_size(), distributed.rank()
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    seen = 0
    for batch in images.batches(0):
        count = len(batch["label"])
        own = own_rows(batch["bad"] < 0, n - seen - rank * count)
        seen += world * count
        if len(own):
            sums += counts(model(batch["image"][own].to(device)), batch["label"][own].to(device))
    return Score.of(distributed.sum_over_ranks(sums), n, model.classes)


def last_line(val: Score | None, test: Score | None) -> str:
    """A run's figures, each with the images that it is of; a line's beginning with test images is upstream's."""
    found = [(val, "validation ", "validation"), (test, "", "test")]
    return "".join(f" * {name}{_figures(score)} ({_of(score, kind)})" for score, name, kind in found if score)


def _figures(score: Score) -> str:
    return f"Acc@1 {score.acc1:.3f}{describe_top5(score.acc5)}"


def _of(score: Score, kind: str) -> str:
    unread = describe_unread(score.unread, score.images + score.unread)
    return f"{score.images} {kind} images{unread}"


# ------------------------------------------------------------------------------------------------------ training


@dataclass
class Tuner(Loop):
    """A fine-tuning: its loss, its reports and its checkpoints. ``about`` is of :func:`moco.train.resume.about_run`,
    ``ema`` of :func:`moco.models.ema.moving_average`.

    Differences from pretraining that are meant: rates are shares of each group's own; a step that is not finite ends
    the run at once; an epoch has ended when it is evaluated; on a CPU the optimizer has the form of the released code,
    which the fused one equals to rounding.
    """

    model: Classifier
    about: dict[str, Any]
    objective: Objective
    lrs: list[float]  # of the optimizer's groups; a file that goes on has those of its last step in them
    ema: Any = None
    classes: list[str] | None = None  # names of the outputs

    def __post_init__(self) -> None:
        self.plan = self.plan.as_shares(max(self.lrs))
        super().__post_init__()
        self.scales = self.lrs
        self.meters: dict[str, Mean] = {}
        self.acc1, self.is_best = 0.0, False  # of the last epoch that was evaluated

    @property
    def evaluated(self) -> Classifier:
        """The network that is evaluated and handed on: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    def finished(self) -> bool:
        """Whether all epochs are done, with their evaluation."""
        return self.progress.epoch >= self.plan.epochs

    def run_epoch(self, images: LabelledBatches, selecting: LabelledBatches, frozen: dict[str, Tensor]) -> Score | None:
        """:meth:`train_epoch` with the rest of the epoch's images, then its evaluation; None where the run must stop.

        Args:
            selecting: images of the evaluation.
            frozen: see :meth:`check_frozen`.
        """
        at = self.progress
        at.draw, self.meters = self.position, {}
        self.train_epoch(images.batches(at.epoch, at.batch))
        if self.exit_code is not None:
            return None
        score = evaluate(self.evaluated, selecting)
        self.check_frozen(frozen)
        self._close_epoch(score)
        return score

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

    def to_device(self, batch: dict) -> dict[str, Tensor]:
        """Images, their labels and numbers."""
        return {name: batch[name].to(self.device, non_blocking=True) for name in ("image", "label", "index")}

    def forward(self, here: dict[str, Tensor]) -> StepOutput:
        """The objective's output."""
        at = self.progress
        return self.objective(self.model, self.wrapped, here, at.seed, at.draw, distributed.rank())

    def after_move(self) -> None:
        """The moving average follows, where the step was taken."""
        if self.ema is not None:
            update_unless(self.bad.float(), self.ema, self.model)

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
        self.log.scalars(self.position, values, epoch=at.epoch, text=text)

    def _close_epoch(self, score: Score) -> None:
        at = self.progress
        at.close_epoch()
        self.is_best = score.acc1 > at.best_acc1 or not at.best_epoch
        if self.is_best:
            at.best_acc1, at.best_epoch = score.acc1, at.epoch
        self.plateau.note(score.acc1)
        self.acc1 = score.acc1

    def report_epoch(self, score: Score | None, which: str) -> None:
        """Record an epoch's evaluation, if there is one, on the images called ``which``."""
        if score is None:
            return
        at = self.progress
        values = {f"{which}_acc1": score.acc1, f"{which}_loss": score.loss}
        values |= {} if score.acc5 is None else {f"{which}_acc5": score.acc5}
        text = (
            f"epoch {at.epoch - 1}: {which} {_figures(score)} (best {at.best_acc1:.3f} after {at.best_epoch} epochs)"
            f"{describe_unread(score.unread, score.images + score.unread)}"
        )
        self.log.scalars(self.position, {**values, "best_acc1": at.best_acc1}, epoch=at.epoch - 1, text=text)

    def result(self, val: Score | None, test: Score | None) -> dict[str, Any]:
        """What result.json says of the last epoch's network, and of the best epoch by the images it was chosen on.

        Of the images so many were counted, ``unreadable`` more could not be read. Sweeps know these names from
        moco/sweep/figures.py.
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
        return values | {"unreadable": sum(score.unread for score in scores.values() if score)}

    def check_frozen(self, reference: dict[str, Tensor]) -> None:
        """With ``freeze``, every tensor but the layer's still equals the ``reference``, upstream's sanity check.

        Raises:
            TrainingError: naming the first tensor that differs.
        """
        own = self.model.backbone() if self.model.freeze else {}
        changed = [name for name, value in own.items() if not torch.equal(value, reference[name])]
        if changed:
            raise TrainingError(
                f"{len(changed)} tensors that --weights freeze keeps differ from the encoder that was read, the first "
                f"{changed[0]}; this accuracy would not be that encoder's."
            )

    # ------------------------------------------------------------------------------------------------ checkpoints

    def save(self, save_dir: str, arch: str) -> None:
        """Write upstream's dictionary and ``run``, what a resumed run needs besides; also as the best one if it is, and
        once more where the plan keeps this epoch's.

        ``state_dict`` is what was evaluated. With a moving average the weights that are trained are ``trained``.
        """
        distributed.by_main(partial(self._write, save_dir, arch))
        if self.exit_code is not None:
            at = self.progress
            self.log.line(describe_stop(at.epoch, at.batch, self.plan.batches))

    def _write(self, save_dir: str, arch: str) -> None:
        at = self.progress
        state = {
            "epoch": at.epoch,
            "arch": arch,
            "state_dict": _prefixed(self.evaluated.encoder),
            "best_acc1": at.best_acc1,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "run": {
                "seed": at.seed,
                "batch": at.batch,
                "best_epoch": at.best_epoch,
                **self.about,
                "classes": self.classes,
                "plateau": self.plateau.state_dict(),
                **images_of(self.model.encoder, self.model.mean, self.model.std),
            },  # fmt: skip
        }
        if self.ema is not None:
            state["trained"] = _prefixed(self.model.encoder)
        kept = self.plan.keep_every and not at.batch and at.epoch % self.plan.keep_every == 0
        if not at.batch:
            state["acc1"] = self.acc1  # of this epoch; moco.average chooses by it
        names = [BEST] * (self.is_best and not at.batch) + [KEPT.format(at.epoch - 1)] * bool(kept) + [CHECKPOINT]
        for name in names:
            files.write(state, os.path.join(save_dir, name))


def load(
    state: dict, path: str, arch: str, model: Classifier, ema: Any,
    optimizer: torch.optim.Optimizer | None, scaler: torch.amp.GradScaler,
) -> None:  # fmt: skip
    """Put a checkpoint of this program, or of SynCo's, back; without an optimizer its network alone, to be evaluated.

    Raises:
        UserError: another kind of file, architecture or network.
    """
    if not isinstance(state.get("state_dict"), dict) or not _ours(state, optimizer is None):
        raise UserError(f"{path} is no checkpoint of this program: give a pretrained encoder by --pretrained.")
    if state.get("arch", arch) != arch:
        raise UserError(f"{path} was trained with -a {state['arch']}; this run has -a {arch}.")
    evaluated, trained = state["state_dict"], state.get("trained", state["state_dict"])
    if ema is not None or optimizer is None:
        _fill(model if ema is None else ema.module, state, evaluated, path)
    if optimizer is None:
        return
    _fill(model, state, trained, path)
    try:
        optimizer.load_state_dict(state["optimizer"])
        if state.get("scaler"):  # empty when the run so far did not scale its loss
            scaler.load_state_dict(state["scaler"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} does not fit this optimizer: {' '.join(str(error).split())}") from error


def progress_of(state: dict, seed: int) -> Progress:
    """Where the run of a checkpoint is."""
    run, epoch = state.get("run") or {}, int(state["epoch"])
    best = {"best_acc1": float(state["best_acc1"]), "best_epoch": int(run.get("best_epoch", epoch))}
    return Progress(seed, epoch, int(run.get("batch", 0)), plateau=run.get("plateau", {}), **best)


def _fill(model: Classifier, state: dict, tensors: dict[str, Tensor], path: str) -> None:
    restore_changes(model.encoder, state, path)
    fill_network(model.encoder, tensors, path)


def _ours(state: dict, weights_only: bool) -> bool:
    return "best_acc1" in state and (weights_only or "optimizer" in state)  # an average of checkpoints has none


def _prefixed(encoder: nn.Module) -> dict[str, Tensor]:
    return {"module." + name: value for name, value in encoder.state_dict().items()}
