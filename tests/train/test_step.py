"""The step decides on the device whether it happened, the host reads the outcome later, and both give the same run."""

import contextlib
import copy
import json
import math
from argparse import Namespace

import pytest
import torch
from conftest import TINY, differences, load
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from moco import distributed
from moco.config import OptimizerConfig
from moco.models import ema
from moco.models.ema import moving_average
from moco.models.moco import MoCo
from moco.train import optimizers
from moco.train.optimizers import build_optimizer, step_unless, use_fused_optimizer_step, waits
from moco.train.pretraining import Trainer, prefetch
from moco.train.timers import StepTimer

READS = {Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__bool__, Tensor.__float__, Tensor.__int__}


class NoReadByName(TorchFunctionMode):
    """Fails where Python asks a tensor for its value."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in READS, f"the host reads a tensor by {func}"
        return func(*args, **(kwargs or {}))


class NoReadBelow(TorchDispatchMode):
    """Fails where an operator hands a value to the host, or has a result whose size depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        assert name not in ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select"), name
        return func(*args, **(kwargs or {}))


def every(steps: int, monkeypatch) -> None:
    """The host looks after so many steps, as on a GPU."""
    original = Trainer.__post_init__

    def prepare(self):
        original(self)
        self.look_every = steps

    monkeypatch.setattr(Trainer, "__post_init__", prepare)


def spoil(draws: set[int], monkeypatch) -> None:
    original = MoCo.forward

    def forward(self, views, ids, epoch, draw, step):
        output = original(self, views, ids, epoch, draw, step)
        return output._replace(loss=output.loss * math.nan, keys=output.keys * math.nan) if draw in draws else output

    monkeypatch.setattr(MoCo, "forward", forward)


@pytest.mark.parametrize("words", [[], ["--accum", 2, "-b", 4], ["--symmetric"]], ids=str)
def test_between_two_looks_the_host_reads_nothing(words, image_folder, tmp_path, in_process, monkeypatch):
    every(3, monkeypatch)
    original, watched = Trainer._step, []

    def step(self, batches):
        follow = self.model._follow_where  # the whole model lies on the host here
        monkeypatch.setattr(self.model, "update_key_encoder", lambda due: follow(due, *self.model._pairs()))
        ready = [next(batches) for _ in range(self.plan.accum)]
        with NoReadByName(), NoReadBelow():
            original(self, iter(ready))
        watched.append(len(self.pending_flags))

    monkeypatch.setattr(Trainer, "_step", step)
    assert in_process(*TINY, *words, "-p", 3, "--steps", 3, "--save-dir", tmp_path, image_folder) == 0
    assert watched == [1, 2, 3]


def test_the_watch_sees_a_read():
    x = torch.ones(2)
    for read in (bool, float, Tensor.tolist):
        with pytest.raises(AssertionError, match="the host reads"), NoReadByName():
            read(x[0])
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReadBelow():
        x[0].item()


def test_a_run_that_looks_seldom_is_the_run_that_looks_always(image_folder, tmp_path, in_process, monkeypatch, capsys):
    spoil({0, 4, 5}, monkeypatch)
    said = []
    for steps in (1, 4):
        with monkeypatch.context() as patch:
            every(steps, patch)
            words = ["--epochs", 3, "-p", 100, "--save-dir", tmp_path / str(steps)]
            assert in_process(*TINY, *words, image_folder) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "nothing was changed" in line]
        lines = [line.removeprefix("warning: ") for line in lines]
        said.append([line.split(":")[0] + line.split("changed")[1] for line in lines])
    assert said[0] == said[1] == ["step 0 (1 in a row)", "step 4 (1 in a row)", "step 5 (2 in a row)"]
    assert differences(load(tmp_path / "1"), load(tmp_path / "4")) == []


def test_too_many_bad_steps_end_the_run_at_the_next_look(image_folder, tmp_path, in_process, monkeypatch, capsys):
    spoil(set(range(2, 99)), monkeypatch)
    every(6, monkeypatch)
    words = ["--epochs", 9, "--max-bad-steps", 2, "--save-every", 99, "--save-dir", tmp_path]
    assert in_process(*TINY, *words, "-p", 6, image_folder) == 3
    assert "error: 2 steps in a row were not finite" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- the optimizer


def sgd_by_hand(weights: list[Tensor], gradients: list[list[Tensor]], lr: float, mu: float, wd: float) -> list[Tensor]:
    """torch's SGD as loops: v <- mu v + (g + wd w), w <- w - lr v."""
    weights, velocity = [w.clone() for w in weights], [torch.zeros_like(w) for w in weights]
    for step in gradients:
        for w, v, g in zip(weights, velocity, step, strict=True):
            v.mul_(mu).add_(g + wd * w)
            w.sub_(lr * v)
    return weights


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_step_that_is_not_taken_leaves_no_trace(layout):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)).to(memory_format=layout)  # type: ignore
    unused = nn.Parameter(torch.ones(3), requires_grad=False)
    begin = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.SGD([*net.parameters(), unused], 0.1, momentum=0.9, weight_decay=0.01)
    use_fused_optimizer_step(optimizer)
    trainer, kept = Namespace(optimizer=optimizer), []
    for bad in (True, False, True, False, False):
        optimizer.zero_grad()
        net(torch.randn(2, 3, 3, 3).contiguous(memory_format=layout)).square().sum().backward()
        gradients = [p.grad.clone() for p in net.parameters()]
        if bad:
            net[0].weight.grad[0, 0, 0, 0] = math.nan
        else:
            kept.append(gradients)
        Trainer._move(trainer, torch.tensor(bad))  # type: ignore[arg-type]
    for p, expected in zip(net.parameters(), sgd_by_hand(begin, kept, 0.1, 0.9, 0.01), strict=True):
        torch.testing.assert_close(p.detach(), expected)
    assert unused not in optimizer.state


def test_an_optimizer_without_a_fused_form_is_asked_by_the_host():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Rprop([weight])
    use_fused_optimizer_step(optimizer)
    weight.grad = torch.ones(2)
    for bad, moved in ((True, False), (False, True)):
        Trainer._move(Namespace(optimizer=optimizer), torch.tensor(bad))  # type: ignore[arg-type]
        assert torch.equal(weight, torch.ones(2)) != moved


def test_the_fused_form_survives_a_checkpoint_without_it(image_folder, tmp_path, in_process, monkeypatch):
    """Upstream's files say fused None, and a group read from a file would silently ignore "not this step"."""
    words = [*TINY, "--save-dir", tmp_path, image_folder]
    assert in_process(*words, "--steps", 1) == 0
    path = next(tmp_path.glob("*.tar"))
    state = load(path)
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = None
    torch.save(state, path)
    spoil({1}, monkeypatch)
    assert in_process(*words, "--steps", 2, "--resume", "auto") == 0
    assert load(tmp_path)["run"]["bad_steps"] == 1
    assert all(bool(v.isfinite().all()) for v in load(tmp_path)["state_dict"].values())


def lars(net: nn.Module) -> torch.optim.Optimizer:
    return build_optimizer(OptimizerConfig("lars", 0.1, 0.9, 0.01), [{"params": list(net.parameters())}])


def test_a_step_that_is_put_back_leaves_no_trace():
    """As a GPU does with LARS, which has no fused form: taken always, and put back where it was bad."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))]
    nets.append(copy.deepcopy(nets[0]))
    steps = [lars(net) for net in nets]
    for bad in (False, True, False, True, False):
        images = torch.randn(5, 4)
        for net, optimizer in zip(nets, steps, strict=True):
            optimizer.zero_grad()
            net(images).square().sum().backward()
            if bad:
                net[0].weight.grad[0, 0] = math.nan
        step_unless(torch.tensor(bad), steps[0])
        if steps[1].state:
            optimizers._on_device[steps[1]] = True
            step_unless(torch.tensor(bad), steps[1])
        else:
            steps[1].step()
    assert differences(nets[0].state_dict(), nets[1].state_dict()) == []
    assert differences(steps[0].state_dict(), steps[1].state_dict()) == []
    assert not hasattr(steps[1], "found_inf")


@pytest.mark.parametrize(("name", "there"), [("lars", True), ("lamb", False), ("lookahead_lars", False)])
def test_a_first_step_shows_what_an_optimizer_changes(name, there):
    weight = nn.Parameter(torch.ones(2, 2, device="meta"))
    optimizer = build_optimizer(OptimizerConfig(name, 0.1, 0.9, 0.01), [{"params": [weight]}])
    weight.grad = torch.ones_like(weight)
    assert not waits(optimizer)
    optimizers._observed(optimizer, torch.device("meta"))
    assert optimizers._on_device[optimizer] == there
    assert waits(optimizer) != there


@pytest.mark.parametrize("called_off", [0.0, 1.0])
def test_the_device_decides_whether_a_moving_average_moves(called_off):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    averages = [moving_average(net, 0.9, None, 1) for _ in range(2)]
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))
    net(torch.randn(6, 4))
    if called_off:
        net[1].running_mean.fill_(math.nan)
    else:
        averages[0].update(net)
    ema._update_where(torch.tensor(called_off), averages[1], net)
    assert differences(averages[0].module.state_dict(), averages[1].module.state_dict()) == []


# --------------------------------------------------------------------------------------- where the time goes


def test_parts_lie_beside_each_other(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("moco.train.timers.time.perf_counter", lambda: now[0])
    parts = StepTimer(torch.device("cpu"))
    for measured in (True, False, True):
        with parts.of_a_step(measured):
            for name, seconds in (("head", 2.0), ("EMA", 1.0), ("head", 3.0)):
                with parts(name):
                    now[0] += seconds
            now[0] += 0.5
    with parts("head"):  # outside of a step nothing counts
        now[0] += 9
    parts.read()
    assert parts.take() == {"head": 5.0, "EMA": 1.0, "other": 0.5}
    assert parts.take() == {}
    assert parts.share("EMA") == pytest.approx(1 / 6.5)
    assert parts.summary() == "6500 ms, head 76.9 %, EMA 15.4 %, other 7.7 %"  # of all since the last one
    assert (parts.summary(), parts.share("EMA")) == ("nothing was measured", 0)
    with parts.of_a_step(True), parts("head"):
        now[0] += 0.25
    parts.read()
    assert parts.summary() == "250 ms, head 100.0 %, other 0.0 %"


def test_the_log_says_now_and_then_where_the_time_goes(
    image_folder, tmp_path, in_process, monkeypatch, capsys
):  # fmt: skip
    """And each record of the steps in between; a line of times or of a file comes after one of the loss."""
    monkeypatch.setattr(StepTimer, "share", lambda *_: 0.0)
    assert in_process(*TINY, "-p", 4, "--epochs", 7, "--save-dir", tmp_path, image_folder) == 0
    said = capsys.readouterr().out.splitlines()
    told = [x.partition(" [")[0] if x.startswith("Epoch") else x.partition(",")[0] for x in said if "poch " in x[:6]]
    assert [x for x in told if x.startswith("e") and "k-NN" not in x and "RankMe" not in x] == [
        "epoch 1", "epoch 3", "epoch 6"
    ], said  # fmt: skip
    losses, saved = (sum(x.startswith(word) for x in said) for word in ("Epoch [", "saved "))
    assert losses == 6 >= saved
    lines = [x for x in said if ", step time: " in x]
    parts = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    parts = [r["step_ms"] for r in parts if "loss" in r]
    assert len(parts) == losses
    for line in lines:
        line = line.partition(";")[0]
        assert set(parts[0]) == {x.rsplit(" ", 2)[0] for x in line.split(" ms, ")[1].split(", ")}
        shares = {x.rsplit(" ", 2)[0]: float(x.rsplit(" ", 2)[1]) for x in line.split(" ms, ")[1].split(", ")}
        assert set(shares) == {"waiting for images", "transfer", "q forward", "shuffle", "k forward", "head",
                               "q backward", "enqueue", "online probe", "optimizer", "EMA", "other"}  # fmt: skip
        assert sum(shares.values()) == pytest.approx(100, abs=1)


def test_a_loader_that_holds_up_the_training_is_told_with_the_flag_that_helps(
    image_folder, tmp_path, in_process, monkeypatch, capsys
):
    for share in (0.2, 0.21):
        monkeypatch.setattr(StepTimer, "share", lambda *_, share=share: share)
        assert in_process(*TINY, "--epochs", 1, "--save-dir", tmp_path / f"{share}", image_folder) == 0
    well, slow = (x for x in capsys.readouterr().out.splitlines() if ", step time: " in x)
    flag = f"try -j {distributed.cores()} (now 0)."
    assert ";" not in well
    assert slow.endswith(f" %; above 20% the loader holds up the training: {flag}")


def test_on_a_cpu_batches_pass_unchanged():
    batches = [{"q": torch.ones(1)}, {"q": torch.zeros(1)}]
    assert list(prefetch(iter(batches), torch.device("cpu"))) == batches


class FakeGpu:
    """torch.cuda's streams without a GPU: ``events`` says what happened, by the stream that was current."""

    def __init__(self, monkeypatch):
        self.events, self.current = [], "main"
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: "side")
        monkeypatch.setattr(torch.cuda, "stream", self.inside)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Namespace(wait_stream=self.waited))

    @contextlib.contextmanager
    def inside(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def waited(self, stream):
        self.note(f"waits for {stream}")

    def note(self, what):
        self.events.append(f"{self.current} {what}")

    def value(self, name):
        def copied(device, non_blocking):
            assert non_blocking
            self.note(f"copies {name}")
            return self.value(name)

        return Namespace(to=copied, record_stream=lambda stream: self.note(f"keeps {name}"))


def test_on_a_gpu_the_next_batch_is_made_ready_beside_the_step(monkeypatch):
    gpu = FakeGpu(monkeypatch)

    def loader():
        for number in (0, 1):
            gpu.note(f"augments {number}")  # moco.data.Finishing works when it is asked for a batch
            yield {"q": gpu.value("q"), "k": gpu.value("k"), "index": gpu.value("index"), "bad": number}

    for batch in prefetch(loader(), torch.device("cuda")):
        gpu.note(f"trains {batch['bad']}")
    copies, keeps = ([f"{x} {name}" for name in ("q", "k", "index")] for x in ("side copies", "main keeps"))
    ready = [["side augments 0", *copies], ["main waits for side", *keeps, "side augments 1", *copies, "main trains 0"]]
    assert gpu.events == sum([*ready, ["main waits for side", *keeps, "main trains 1"]], [])


@pytest.mark.parametrize("aug_device", ["cpu", "gpu"])
def test_views_are_shuffled_as_bytes(aug_device, image_folder, tmp_path, in_process, monkeypatch):
    original, sent = distributed.exchange_rows, []

    def watched(x, permutation):
        sent.append(x)
        return original(x, permutation)

    monkeypatch.setattr(distributed, "exchange_rows", watched)
    words = ["--steps", 1, "--aug-device", aug_device, "--save-dir", tmp_path]
    assert in_process(*TINY, *words, image_folder) == 0
    assert [(x.dtype, tuple(x.shape)) for x in sent] == [(torch.uint8, (8, 3, 16, 16)), (torch.float32, (8, 16))]


def test_the_encoders_are_compiled_as_asked(image_folder, tmp_path, in_process, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **how: asked.append(how))
    monkeypatch.setattr(torch, "compile", lambda call: call)
    words = [*TINY, "--steps", 1, "--overwrite", "--save-dir", tmp_path, image_folder]
    assert in_process(*words, "--compile", "--compile-mode", "reduce-overhead") == 0
    assert in_process(*words, "--compile") == 0
    assert asked == [{"mode": "reduce-overhead"}] * 2 + [{"mode": "default"}] * 2
    assert in_process(*words, "--compile", "--local-crops", 1, "--local-crop-size", 8) == 0
    assert asked[4:] == [{"mode": "default", "dynamic": False}] * 2  # a graph for each size
    with pytest.raises(SystemExit, match="2"):
        in_process(*words, "--compile-mode", "reduce-overhead")
    assert "says how to --compile; give both" in capsys.readouterr().err


def test_a_machine_that_cannot_compile_says_so(image_folder, tmp_path, in_process, monkeypatch, capsys):
    def fails(call):
        raise RuntimeError("no compiler here\nand a long trace")

    monkeypatch.setattr(torch, "compile", fails)
    assert in_process(*TINY, "--steps", 1, "--compile", "--save-dir", tmp_path, image_folder) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: --compile: torch.compile does not work on this machine (no compiler here)")


def test_a_run_that_recomputes_is_the_run_that_keeps(image_folder, tmp_path, in_process):
    for words in (["--save-dir", tmp_path / "keeps"], ["--save-dir", tmp_path / "recomputes", "--recompute"]):
        assert in_process(*TINY, "--steps", 2, *words, image_folder) == 0
    assert differences(load(tmp_path / "keeps"), load(tmp_path / "recomputes")) == []


@pytest.mark.parametrize("called_off", [False, True])
def test_a_step_that_is_called_off_leaves_no_nan_in_tensors_that_no_fused_operator_takes(called_off):
    k = [torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.ones(3)]
    q = [torch.full((2, 3, 4, 4), math.nan if called_off else 3.0), torch.full((3,), 3.0, dtype=torch.float64)]
    ema.lerp_unless(torch.tensor(float(called_off)), k, q, 0.25)
    assert all(bool((x == (1.0 if called_off else 1.5)).all()) for x in k)
    masks, counts = [torch.tensor([True, False]), torch.tensor(4)], [torch.tensor([False, True]), torch.tensor(9)]
    ema._copy_unless(torch.tensor(float(called_off)), masks, counts)
    assert [x.tolist() for x in masks] == ([[True, False], 4] if called_off else [[False, True], 9])
