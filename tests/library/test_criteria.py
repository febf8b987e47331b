"""The losses as modules: equal to the program's, to other libraries', in two processes, after a resume."""

import copy
import math
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import SYNCO, TINY, rounding, two_of
from pytorch_metric_learning import losses as others
from torch import Tensor

import moco
from moco.models.in_batch import BatchContrast
from moco.models.moco import MoCo as ProgramsMoCo

OWN = [word for word in TINY if word not in ("--moco-k", "20")]  # naming a queue would ask for one
SYNCO_ARGUMENTS = {"n_hard": 8, "n1": 4, "n2": 4, "n3": 4, "n4": 2, "n5": 2, "n6": 2}
LABELS = torch.tensor([0, 1, 0, 2, 1, 0])


def features(rows: int = 6, width: int = 16, seed: int = 0, **like) -> tuple[Tensor, Tensor]:
    """Two views, none of unit length; the first has a gradient."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (3 * torch.randn(rows, width, generator=generator, **like) for _ in range(2))
    return q.requires_grad_(), k


def queue_losses(K: int = 20, **options) -> list[moco.MoCoLoss | moco.MoCHiLoss | moco.SynCoLoss]:
    return [
        moco.MoCoLoss(16, K, 0.2, **options),
        moco.MoCHiLoss(16, K, 0.2, n_hard=8, s=4, s2=4, **options),
        moco.SynCoLoss(16, K, 0.2, **SYNCO_ARGUMENTS, **options),
    ]


def in_batch_losses() -> list[torch.nn.Module]:
    return [moco.SimCLRLoss(0.2), moco.HCLLoss(0.2), moco.DCLLoss(0.2), moco.SupConLoss(0.2)]


KINDS = ("MoCoLoss", "MoCHiLoss", "SynCoLoss")

# -------------------------------------------------------------------------------------------- equal to the program's


def recorded(monkeypatch, model: type) -> list[dict]:
    """What goes into the losses of a run of the program and what comes out, filled while it runs."""
    steps: list[dict] = []
    original = model.forward

    def forward(self, views, ids, epoch=0, draw=0, step=0):
        outputs: list[Tensor] = []
        encoders = [self.encoder_q, *([self.encoder_k] if model is ProgramsMoCo else [])]
        hooks = [e.register_forward_hook(lambda m, i, out: outputs.append(out.detach().clone())) for e in encoders]
        made = original(self, views, ids, epoch, draw, step)
        for hook in hooks:
            hook.remove()
        labels = None if getattr(self, "labels", None) is None else self.labels[ids]
        steps.append({"z": outputs, "ids": ids, "labels": labels, "epoch": epoch, "loss": made.loss.detach()})
        return made

    monkeypatch.setattr(model, "forward", forward)
    return steps


@pytest.mark.parametrize(
    ("words", "made"),
    [
        ([], lambda: moco.MoCoLoss(16, 20, seed=3)),
        (["--mochi", 8, 4, 4, "--hard-start-epoch", 1], lambda: moco.MoCHiLoss(16, 20, n_hard=8, s=4, s2=4, seed=3,
                                                                              start_epoch=1)),
        ([*SYNCO, "--moco-t", 0.2], lambda: moco.SynCoLoss(16, 20, 0.2, seed=3, **SYNCO_ARGUMENTS)),
    ],
    ids=KINDS,
)  # fmt: skip
def test_a_queues_loss_is_the_programs_bit_for_bit(words, made, image_folder, tmp_path, in_process, monkeypatch):
    steps = recorded(monkeypatch, ProgramsMoCo)
    words = [*TINY, "--no-shuffle-bn", "--steps", 7, *words, "--save-dir", tmp_path, image_folder]
    assert in_process(*words) == 0
    criterion = made()
    for step in steps:
        criterion.epoch = step["epoch"]
        assert torch.equal(criterion(*step["z"], step["ids"]), step["loss"])
    assert len(steps) == 7 and not torch.equal(criterion.queue, made().queue)


@pytest.mark.parametrize(
    ("words", "criterion"),
    [
        (["--method", "simclr"], moco.SimCLRLoss(base_temperature=0.07)),
        (["--method", "supcon", "--moco-t", 0.1], moco.SupConLoss(temperature=0.1)),
        (["--method", "hcl", "--beta", 0.5], moco.HCLLoss(beta=0.5)),
        (["--method", "dcl", "--contrast-mode", "one"], moco.DCLLoss(contrast_mode="one")),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_a_batchs_loss_is_the_programs_bit_for_bit(words, criterion, image_folder, tmp_path, in_process, monkeypatch):
    steps = recorded(monkeypatch, BatchContrast)
    assert in_process(*OWN, "--steps", 4, *words, "--save-dir", tmp_path, image_folder) == 0
    for step in steps:
        q, k = step["z"][0].chunk(2)
        labels = () if step["labels"] is None else (step["labels"],)
        assert torch.equal(criterion(q, k, *labels), step["loss"])
        assert torch.equal(criterion(torch.stack([q, k], 1), **({"labels": labels[0]} if labels else {})), step["loss"])
    assert len(steps) == 4


# ------------------------------------------------------------------------------------------- equal to other libraries'


def rows_and_labels(q: Tensor, k: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([q, k]), torch.cat([labels, labels])


@pytest.mark.parametrize(
    ("ours", "theirs", "labels"),
    [
        (moco.SimCLRLoss(0.2), others.NTXentLoss(0.2), torch.arange(6)),
        (moco.SupConLoss(0.2, base_temperature=None), others.SupConLoss(0.2), LABELS),
    ],
    ids=["SimCLR", "SupCon"],
)
def test_pytorch_metric_learning_agrees_in_value_and_gradient(ours, theirs, labels):
    q, k = features(dtype=torch.float64)
    k.requires_grad_()
    loss = ours(torch.stack([q, k], 1), labels) if isinstance(ours, moco.SupConLoss) else ours(q, k)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = theirs(*rows_and_labels(q, k, labels))
    torch.testing.assert_close(loss, other, rtol=1e-9, atol=0)
    for mine, its in zip(*(torch.autograd.grad(x, (q, k)) for x in (loss, other)), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-7, atol=1e-12)


def supcontrasts(features: Tensor, mask: Tensor, T: float, base: float) -> Tensor:
    """Loops over the formula of SupContrast's public code, features of unit length."""
    n, views = features.shape[:2]
    rows = F.normalize(features, dim=2)
    losses = []
    for a in ((i, v) for v in range(views) for i in range(n)):
        rest = [b for b in ((i, v) for v in range(views) for i in range(n)) if b != a]
        logits = torch.stack([rows[a] @ rows[b] for b in rest]) / T
        positive = torch.tensor([bool(mask[a[0], b[0]]) for b in rest])
        mean = (logits - logits.logsumexp(0))[positive].sum() / max(1, int(positive.sum()))
        losses.append(-T / base * mean)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("given", ["labels", "a column of labels", "mask", "a mask of one side", "neither"])
def test_supcontrasts_call(given):
    """features [bsz, n_views, ...] with labels, a mask or neither."""
    z = torch.stack(features(dtype=torch.float64), 1).detach().view(6, 2, 4, 4)
    mask = torch.eye(6) if given == "neither" else (LABELS[:, None] == LABELS).float()
    if given == "a mask of one side":
        mask[0, 2] = mask[5, 5] = 0
    named = {
        "labels": {"labels": LABELS}, "a column of labels": {"labels": LABELS[:, None]}, "mask": {"mask": mask},
        "a mask of one side": {"mask": mask},
    }.get(given, {})  # fmt: skip
    expected = supcontrasts(z.flatten(2), mask, 0.1, 0.07)
    torch.testing.assert_close(moco.SupConLoss(temperature=0.1)(z, **named), expected)
    if "labels" in named:
        torch.testing.assert_close(moco.SupConLoss(temperature=0.1)(z, named["labels"]), expected)


def test_supcontrasts_gradient():
    """For whoever normalises before the loss, as its README advises; ours normalises what is unit already."""
    gradients = []
    for ours in (True, False):
        x = torch.randn(6, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        z, mask = torch.nn.functional.normalize(x, dim=2), (LABELS[:, None] == LABELS).float()
        (moco.SupConLoss(temperature=0.1)(z, LABELS) if ours else supcontrasts(z, mask, 0.1, 0.07)).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


# ------------------------------------------------------------------------------------------------------ the queue


@pytest.mark.parametrize("criterion", queue_losses(), ids=KINDS)
def test_a_state_that_is_loaded_goes_on_bit_for_bit(criterion, tmp_path):
    straight, first = (copy.deepcopy(criterion) for _ in range(2))
    ids = torch.arange(6)
    whole = [straight(*features(seed=i), ids) for i in range(6)]
    parts = [first(*features(seed=i), ids) for i in range(3)]
    torch.save(first.state_dict(), tmp_path / "loss.pt")
    resumed = copy.deepcopy(criterion)
    resumed.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
    parts += [resumed(*features(seed=i), ids) for i in range(3, 6)]
    assert torch.equal(torch.stack(whole), torch.stack(parts))
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert int(straight.calls) == 6 and int(straight.queue_ptr) == 36 % 20


@pytest.mark.parametrize("criterion", queue_losses(), ids=KINDS)
def test_without_update_and_in_eval_mode_the_queue_stays(criterion):
    criterion = copy.deepcopy(criterion)
    criterion(*features())
    before = {name: value.clone() for name, value in criterion.state_dict().items()}
    criterion.eval()(*features(seed=1))
    assert all(torch.equal(value, before[name]) for name, value in criterion.state_dict().items())
    criterion.train()(*features(seed=1), update=False)
    changed = [name for name, value in criterion.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["calls"]  # a second loss of the batch has draws of its own


def test_keys_that_are_not_finite_stay_out_of_the_queue():
    criterion = moco.MoCoLoss(16, 20)
    old = criterion.queue.clone()
    q, k = features()
    k[1], k[3, 0] = math.nan, math.inf
    criterion(q, k, torch.arange(6))
    stay = torch.tensor([1, 3])
    assert torch.equal(criterion.queue[stay], old[stay]) and criterion.queue_ids[:6].tolist() == [0, -1, 2, -1, 4, 5]
    assert criterion.queue.isfinite().all() and int(criterion.queue_ptr) == 6
    assert criterion(*features(seed=1)).isfinite()


def test_more_keys_than_rows_leave_the_last_ones():
    criterion = moco.MoCoLoss(16, 4)
    q, k = features()
    criterion(q, k, torch.arange(6))
    assert criterion.queue_ids[torch.arange(2, 6) % 4].tolist() == [2, 3, 4, 5]
    assert torch.equal(criterion.queue[torch.arange(2, 6) % 4], F.normalize(k, dim=1)[2:])
    assert int(criterion.queue_ptr) == 6 % 4


def test_ids_leave_out_rows_of_the_same_image():
    q, k = features()
    losses = []
    for ids in (torch.arange(6), torch.arange(6, 12)):
        criterion = moco.MoCoLoss(16, 20, 0.2)
        criterion(q, k, torch.arange(6))
        losses.append(criterion(q, k, ids))
    assert losses[0] < losses[1]  # in which an image's earlier key is a negative of it


@pytest.mark.parametrize("start", [{"start_epoch": 1}, {"start_step": 2}], ids=["epoch", "step"])
def test_synthetic_negatives_warm_up(start):
    plain, warm = moco.MoCoLoss(16, 20, 0.2), moco.SynCoLoss(16, 20, 0.2, **SYNCO_ARGUMENTS, **start)
    found = []
    for i in range(4):
        warm.epoch = i // 2
        found.append(torch.equal(plain(*features(seed=i)), warm(*features(seed=i))))
    assert found == [True, True, False, False]
    warm.step, warm.epoch = 0, 0  # one's own count goes before the number of calls
    assert torch.equal(plain(*features(seed=9)), warm(*features(seed=9)))


def test_an_epoch_that_nobody_sets_is_an_error():
    with pytest.raises(moco.UserError, match="SynCoLoss begins or ends by epochs: set its epoch"):
        moco.SynCoLoss(16, 20, **SYNCO_ARGUMENTS, start_epoch=1)(*features())


# ------------------------------------------------------------------------------------------------- as torch's modules


@pytest.mark.parametrize("criterion", queue_losses() + in_batch_losses(), ids=lambda c: type(c).__name__)
class TestEveryLoss:
    def test_statistics_need_no_gradient_and_say_what_is_usual(self, criterion):
        criterion = copy.deepcopy(criterion)
        loss = criterion(*features())
        assert not any(value.requires_grad or value.dim() for value in criterion.stats.values())
        assert {"top1", "top5", "hardest", "loss_ratio"} <= criterion.stats.keys()
        if hasattr(criterion, "queue"):
            assert float(criterion.stats["loss_ratio"]) == pytest.approx(float(loss.detach()) / math.log(21))
            return
        alike = torch.ones(6, 16)
        terms = 10 if isinstance(criterion, moco.DCLLoss) else 11
        scale = 0.2 / 0.07 if isinstance(criterion, moco.SupConLoss) else 1
        assert float(criterion(alike, alike)) == pytest.approx(scale * math.log(terms), rel=1e-4)
        assert float(criterion.stats["loss_ratio"]) == pytest.approx(1, rel=1e-4)

    def test_float64_has_the_precision_of_it(self, criterion):
        q, k = features(dtype=torch.float64)
        made = [copy.deepcopy(criterion)(*x) for x in ((q, k), (q.float(), k.float()))]
        assert made[0].dtype == torch.float64 and made[1].dtype == torch.float32
        assert float(made[0].detach()) == pytest.approx(
            float(made[1].detach()), rel=1e-2
        )  # bf16 on a CPU that prefers it
        assert float(made[0].detach()) != float(made[1].detach())

    def test_half_features_under_autocast_are_computed_in_float32(self, criterion):
        q, k = (x.detach().bfloat16() for x in features())
        with torch.autocast("cpu", torch.bfloat16):
            loss = copy.deepcopy(criterion)(q, k)
        assert loss.dtype == torch.float32
        assert torch.equal(loss, copy.deepcopy(criterion)(q.float(), k.float()))

    def test_it_compiles(self, criterion):
        q, k = (x.detach() for x in features())
        plain, compiled = copy.deepcopy(criterion), torch.compile(copy.deepcopy(criterion), backend="eager")
        for _ in range(2):
            assert torch.equal(plain(q, k), compiled(q, k))

    def test_a_copy_is_one_of_its_own(self, criterion):
        one = copy.deepcopy(criterion)
        one(*features())  # with statistics of a graph
        twin = copy.deepcopy(one)
        before = {name: value.clone() for name, value in twin.state_dict().items()}
        loss = one(*features(seed=1))
        assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())
        assert torch.equal(twin(*features(seed=1)), loss)


MISTAKES = [
    (lambda: moco.SynCoLoss(K=512), "n_hard 1024 is more than the queue's 512 rows; lower it."),
    (lambda: moco.SynCoLoss(sigma=-1), "sigma must be at least 0, not -1."),
    (lambda: moco.MoCHiLoss(s=-1), "s must be at least 0, not -1."),
    (lambda: moco.MoCHiLoss(start_epoch=3, stop_epoch=2), "stop_epoch must come after start_epoch."),
    (lambda: moco.MoCoLoss(T=0), "T must be a number above 0, not 0."),
    (lambda: moco.MoCoLoss(K=2.5), "K must be a whole number, not 2.5."),  # type: ignore[arg-type]
    (lambda: moco.MoCoLoss(impl="fast"), "impl must be one of auto, reference, cpu, triton, not 'fast'."),
    (lambda: moco.HCLLoss(tau_plus=1), "tau_plus is a share from 0 to below 1, not 1."),
    (lambda: moco.SupConLoss(contrast_mode="two"), "contrast_mode must be one of all, one, not 'two'."),
    (lambda: moco.MoCoLoss()(*features()), "MoCoLoss of dim 128 takes q and k (N, 128), not (6, 16) and (6, 16)."),
    (lambda: moco.MoCoLoss(16)(*features(), torch.zeros(3)), "takes ids (N,) of whole numbers"),
    (lambda: moco.MoCoLoss(16)(features()[0].to("meta"), features()[1]), "move the loss there with .to()."),
    (lambda: moco.SimCLRLoss()(features()[0]), "takes q and k (N, C), or features (N, V, C), not (6, 16)."),
    (lambda: moco.SupConLoss()(*features(), LABELS[:3]), "labels (3,) does not fit 6 images"),
    (lambda: moco.SimCLRLoss()(torch.ones(0, 4), torch.ones(0, 4)), "SimCLRLoss got an empty batch (0, 4): leave"),
    (lambda: moco.SupConLoss()(torch.ones(0, 2, 4)), "SupConLoss got an empty batch (0, 2, 4): leave it out"),
    (lambda: moco.MoCoLoss(4)(torch.ones(0, 4), torch.ones(0, 4)), "MoCoLoss got an empty batch (0, 4): leave it out"),
    (lambda: moco.SimCLRLoss()(torch.ones(6, 4), torch.ones(5, 4)), "not (6, 4) and (5, 4)."),
    (lambda: moco.DCLLoss()(torch.ones(6, 1, 4)), "DCLLoss got one view of each of 6 images"),
    (lambda: moco.SupConLoss()(torch.ones(6, 1, 4)), "SupConLoss got one view of each of 6 images"),
    (
        lambda: moco.HCLLoss()(torch.ones(6, 2, 4).long()),
        "takes features as a tensor of floating-point numbers, not int64",
    ),
    (lambda: moco.HCLLoss()([[1.0]]), "takes features as a tensor of floating-point numbers, not list"),  # type: ignore
    (lambda: moco.SupConLoss()(torch.ones(6, 2, 4), mask=torch.ones(2, 2)), "mask (2, 2) does not fit 6 images"),
    (lambda: moco.SupConLoss()(torch.ones(6, 2, 4), LABELS, torch.eye(6)), "give SupConLoss one of them."),
]


@pytest.mark.parametrize(("make", "sentence"), MISTAKES, ids=[sentence[:30] for _, sentence in MISTAKES])
def test_a_mistake_is_one_sentence(make, sentence):
    with pytest.raises(moco.UserError) as caught:
        make()
    assert sentence in str(caught.value)


def test_an_unknown_option_is_pythons_own_error():
    with pytest.raises(TypeError, match="'n7'"):
        moco.SynCoLoss(n7=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="features, labels, mask"):
        moco.SupConLoss()(torch.ones(6, 2, 4), LABELS, label=LABELS)


# --------------------------------------------------------------------------------------------------- two processes


class Holder(torch.nn.Module):
    """A module of a user's that holds its loss; DistributedDataParallel sends the queue with each step."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network, self.criterion = network, moco.MoCoLoss(16, 20, 0.2)

    def forward(self, q, k):
        return self.criterion(self.network(q), k)


def everything(rank: int, size: int) -> dict[str, list[Tensor]]:
    """Losses, gradients and queues of this process's share of two batches."""
    found = {}
    torch.manual_seed(7)
    network = torch.nn.Linear(16, 16)
    trained = torch.nn.parallel.DistributedDataParallel(network) if size > 1 else network
    for criterion in (moco.MoCoLoss(16, 20, 0.2), *in_batch_losses()):
        values = []
        for i in range(2):
            q, k, labels = (x.detach()[rank * 6 // size : (rank + 1) * 6 // size] for x in (*features(seed=i), LABELS))
            labels = (labels,) if isinstance(criterion, (moco.SupConLoss, moco.MoCoLoss)) else ()
            network.zero_grad()
            loss = criterion(trained(q), trained(k) if not hasattr(criterion, "queue") else k, *labels)
            loss.backward()
            assert network.weight.grad is not None
            values += [loss.detach(), network.weight.grad.clone()]
        found[type(criterion).__name__] = [*values, *criterion.state_dict().values()]
    holder: torch.nn.Module = Holder(network)
    if size > 1:
        holder = torch.nn.parallel.DistributedDataParallel(holder)
    share = slice(rank * 6 // size, (rank + 1) * 6 // size)
    losses = [holder(*(x.detach()[share] for x in features(seed=i))) for i in range(2)]
    network.zero_grad()
    losses[1].backward()
    assert network.weight.grad is not None
    found["Holder"] = [losses[0].detach(), torch.zeros(1), losses[1].detach(), network.weight.grad.clone()]
    return found


def one_of_two(rank: int, folder: str) -> None:
    """A process of a user's own group."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(everything(rank, 2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.dist
def test_two_processes_of_ones_own_compute_what_one_does(tmp_path):
    two_of(one_of_two, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, alone in everything(0, 1).items():
        for place, value in enumerate(alone):
            both = [found[name][place] for found in (first, second)]
            if place in (0, 2):  # the loss
                torch.testing.assert_close(sum(both) / 2, value, rtol=rounding(100), atol=0)
            elif place in (1, 3):
                torch.testing.assert_close(both[0], value, rtol=1e-4, atol=1e-6)
                assert torch.equal(*both)
            else:  # the state
                assert torch.equal(*both) and torch.equal(both[0], value)
