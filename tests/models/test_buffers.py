"""Little buffers as views of flat tensors: what is remembered comes back, whatever was done to the network."""

import copy
import os

import pytest
import torch
from conftest import differences
from torch import nn

from moco import files
from moco.models.batchnorm import split_batchnorm
from moco.models.buffers import ALIGNMENT, Counts, Rounded, Small
from moco.models.encoder import build_encoder

GPU = torch.device("cuda")  # only a word here: the tensors are on the CPU


def network() -> nn.Module:
    """Two layers of statistics, their number no multiple of an alignment, and a buffer of two dimensions."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 7, 3), nn.BatchNorm2d(7))
    net.register_buffer("table", torch.randn(3, 5))
    net.register_buffer("left", torch.zeros(4))
    return net


def forward(net: nn.Module) -> None:
    net[4](net[3](net[2](net[1](net[0](torch.randn(4, 3, 8, 8))))))  # type: ignore[operator, index]
    net.table.add_(1)  # type: ignore[operator, union-attr]


def values(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items() if name != "left"}


def snapshot_holds(small: Small, net: nn.Module) -> None:
    """A step that is kept, and one that is not."""
    before = values(net)
    restore = small.snapshot()
    forward(net)
    net.left.fill_(float("nan"))  # type: ignore[operator, union-attr]
    changed = values(net)
    assert len(differences(before, changed)) >= 7  # three of each layer, and the table
    restore(torch.tensor(False))
    assert differences(values(net), changed) == []
    restore(torch.tensor(True))
    assert differences(values(net), before) == []
    assert bool(net.left.isnan().all())  # type: ignore[operator, union-attr]


def replaced(net: nn.Module) -> nn.Module:
    net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)
    return net


def loaded(net: nn.Module) -> nn.Module:
    net.load_state_dict({name: value + 1 for name, value in net.state_dict().items()})
    return net


@pytest.mark.parametrize(
    "change",
    [lambda net: net, lambda net: net.double().float(), lambda net: net.half().float(), replaced, loaded,
     lambda net: net.to(memory_format=torch.channels_last)],
)  # fmt: skip
def test_what_is_remembered_comes_back_after(change):
    net = network()
    small = Small(net, leave=("left",))
    snapshot_holds(small, net)
    snapshot_holds(small, change(net))


def test_a_deep_copy_has_its_own():
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.small = Small(self.net, leave=("left",))

    owner = Owner()
    snapshot_holds(owner.small, owner.net)
    other = copy.deepcopy(owner)
    kept = values(owner.net)
    snapshot_holds(other.small, other.net)
    forward(other.net)
    assert differences(values(owner.net), kept) == []
    snapshot_holds(owner.small, owner.net)


def test_buffers_stay_the_objects_that_they_are_in_few_memories():
    net = network()
    net.alias = nn.Module()
    net.alias.register_buffer("again", net.table)  # type: ignore[union-attr]
    before = dict(net.named_buffers())
    small = Small(net, leave=("left",))
    small.snapshot()
    assert all(value is before[name] for name, value in net.named_buffers())
    views = [value for name, value in before.items() if name != "left"]
    assert len({value.untyped_storage().data_ptr() for value in views}) == 2  # floats and counters
    assert all(value.data_ptr() % ALIGNMENT == 0 for value in views)
    assert net.alias.again is net.table
    snapshot_holds(small, net)


def test_a_file_holds_no_more_than_its_tensors(tmp_path):
    net = network()
    states = []
    for name in ("before", "after"):
        part = {f"module.{n}": value for n, value in net.state_dict().items() if n.startswith("1.")}
        states.append({"state_dict": part, "run": {"pair": (net[1].running_mean, [1])}})
        files.write(states[-1], str(tmp_path / name))
        Small(net).snapshot()
    assert os.path.getsize(tmp_path / "after") <= os.path.getsize(tmp_path / "before") + 1000
    read = files.read(str(tmp_path / "after"))
    assert differences(read, states[0]) == []
    for value in read["state_dict"].values():
        assert value.untyped_storage().nbytes() == value.nbytes


def test_a_compiled_network_keeps_its_graph():
    torch._dynamo.reset()
    results = []
    for flat in (False, True):
        net = network()
        body = nn.Sequential(*net[:5])  # type: ignore[index]
        body.compile(backend="aot_eager")
        torch.manual_seed(1)
        for step in range(3):
            small = Small(net)
            with torch.compiler.set_stance("fail_on_recompile" if step > 1 else "default"):
                body(torch.randn(4, 3, 8, 8)).sum().backward()
            if flat and step < 1:
                small.snapshot()
        results.append({**values(net), **{f"{n}.grad": p.grad for n, p in net.named_parameters()}})
    assert differences(*results) == []


# ------------------------------------------------------------------------------------------------ the counters


@pytest.mark.parametrize("splits", [1, 2])
def test_batches_are_counted_as_each_layer_would(splits):
    torch.manual_seed(0)
    plain = split_batchnorm(build_encoder("test_resnet", 8, size=16), splits)
    norms = [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
    norms[0].eval()
    norms[1].momentum = 0.1 if splits > 1 else None  # the mean over all batches, which asks how many they were
    other = copy.deepcopy(plain)
    counts = Counts(other)
    for _ in range(2):
        images = torch.randn(4, 3, 16, 16)
        plain(images)
        with counts.at_once(GPU):
            other(images)
    assert differences(plain.state_dict(), other.state_dict()) == []
    other.eval()
    with counts.at_once(GPU):
        other(torch.randn(4, 3, 16, 16))
    assert differences(plain.state_dict(), other.state_dict()) == []


def test_counters_are_back_after_an_error():
    net = nn.Sequential(nn.BatchNorm1d(3))
    counter = net[0].num_batches_tracked
    with pytest.raises(ValueError, match="expected"), Counts(net).at_once(GPU):
        net(torch.ones(2, 3, 4, 5))
    assert net[0].num_batches_tracked is counter
    assert int(counter) == 0


def test_a_compiled_encoder_and_a_cpu_count_for_themselves():
    net = nn.Sequential(nn.BatchNorm1d(3))
    counter = net[0].num_batches_tracked
    with Counts(net).at_once(torch.device("cpu")):
        assert net[0].num_batches_tracked is counter
    net.compile(backend="eager")
    with Counts(net).at_once(GPU):
        assert net[0].num_batches_tracked is counter


# ------------------------------------------------------------------------------------------------- rounded weights


def autocast_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)


def test_weights_rounded_at_once_give_autocasts_bits(monkeypatch):
    net = build_encoder("test_resnet", 8, size=16).eval().requires_grad_(False)
    images, rounded = torch.randn(4, 3, 16, 16), Rounded(net)
    before = {name: (p, p.clone()) for name, p in net.named_parameters()}
    for _ in range(2):
        for weight, old in before.values():
            weight.add_(0.25 * old)  # as the key encoder follows between the steps
        with torch.autocast("cpu", torch.bfloat16):
            wanted = net(images)
            with monkeypatch.context() as patch:
                autocast_on_a_gpu(patch)
                context = rounded.at_once(GPU)
                context.__enter__()
            kinds = {type(m): m.weight.dtype for m in net.modules() if "weight" in m._parameters}
            got = net(images)
            context.__exit__(None, None, None)
        assert kinds[nn.Conv2d] == kinds[nn.Linear] == torch.bfloat16
        assert kinds[nn.BatchNorm2d] == torch.float32
        assert torch.equal(got, wanted)
        assert all(net.get_parameter(name) is p for name, (p, _) in before.items())


def test_weights_stay_as_they_are_without_autocast_and_after_an_error(monkeypatch):
    net = nn.Sequential(nn.Linear(3, 2))
    with Rounded(net).at_once(GPU):
        assert net[0].weight.dtype == torch.float32
    autocast_on_a_gpu(monkeypatch)
    with Rounded(net).at_once(torch.device("cpu")):
        assert net[0].weight.dtype == torch.float32
    with pytest.raises(RuntimeError), Rounded(net).at_once(GPU):
        net(torch.zeros(1, 5))  # of the wrong width
    assert isinstance(net[0].weight, nn.Parameter)


def test_layers_that_do_more_with_their_weights_are_left_alone(monkeypatch):
    plain, spectral = nn.Linear(3, 2, bias=False), nn.utils.spectral_norm(nn.Linear(2, 2))
    weight_norm = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    net = nn.Sequential(plain, spectral, weight_norm)
    autocast_on_a_gpu(monkeypatch)
    with Rounded(net).at_once(GPU):
        assert plain.weight.dtype == torch.bfloat16
        assert spectral.weight_orig.dtype == spectral.bias.dtype == torch.float32
        assert weight_norm.bias.dtype == torch.float32


def test_a_buffer_that_is_given_up_is_no_longer_remembered():
    net = nn.BatchNorm2d(3)
    small = Small(net)
    small.snapshot()
    net.running_var = None
    restore = small.snapshot()
    net.running_mean.fill_(7)
    restore(torch.tensor(True))
    assert net.running_mean.tolist() == [0, 0, 0]
