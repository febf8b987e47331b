"""What is loaded into an optimizer fits its parameters: a fused step checks nothing itself."""

import copy

import pytest
import torch
from torch import nn

from moco.config import OptimizerConfig
from moco.train.optimizer_state import finite
from moco.train.optimizers import build_optimizer, use_fused_optimizer_step

OPTIMIZERS = ("sgd", "adamw", "lars", "lamb", "lookahead_adamw", "adafactor", "adan")
SHAPES = (130, 140), (5,), (4, 3, 3, 3), (1,)


def made(name: str, weights: list | None = None, steps: int = 7):
    """An optimizer of two groups after some steps, and its parameters."""
    torch.manual_seed(0)
    weights = weights or [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    groups = [{"params": weights[:2]}, {"params": weights[2:], "weight_decay": 0.0}]
    optimizer = build_optimizer(OptimizerConfig(name, 0.01, 0.9, 0.1), groups)
    for _ in range(steps):
        move(optimizer, weights)
    return optimizer, weights


def move(optimizer, weights) -> None:
    for p in weights:
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_optimizer_goes_on_bit_for_bit(name):
    """LAMB and Adan count their steps in the group, which a new one has not yet."""
    before, weights = made(name)
    after, loaded = made(name, [nn.Parameter(p.detach().clone()) for p in weights], steps=0)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    move(before, weights)
    move(after, loaded)
    assert all(map(torch.equal, weights, loaded))


def test_momentum_of_another_memory_layout_goes_on_as_its_own():
    """A fused step takes the momentum in the order of the memory: the weights would get one another's."""
    p = nn.Parameter(torch.randn(4, 3, 2, 2))
    other = nn.Parameter(p.detach().clone(memory_format=torch.channels_last))
    before, after = (build_optimizer(OptimizerConfig("sgd", 0.1, 0.9, 0.1), [x]) for x in (p, other))
    move(before, [p])
    other.data.copy_(p.data)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    use_fused_optimizer_step(after)
    move(before, [p])
    move(after, [other])
    torch.testing.assert_close(other.detach(), p.detach())


TENSORS = {
    "removed": None,
    "of nothing": lambda x: None,
    "a word": lambda x: "x",
    "nested": lambda x: {"x": x},
    "one number": lambda x: x.flatten()[:1].clone(),
    "empty": lambda x: x.flatten()[:0].clone(),
    "transposed": lambda x: x.T.contiguous(),
    "halves": lambda x: x.half(),
    "whole numbers": lambda x: x.long(),
    "complex": lambda x: x.to(torch.complex64),
    "NaN": lambda x: x.clone().fill_(torch.nan),
    "without numbers": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
}


@pytest.mark.filterwarnings("ignore:.*quantiz.*:")
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("how", TENSORS)
def test_no_tensor_that_a_step_would_not_leave_is_loaded(how, name):
    before, _ = made(name)
    after, weights = made(name, steps=0)
    names = [
        n for n, value in before.state_dict()["state"][0].items() if isinstance(value, torch.Tensor) and value.ndim
    ]
    assert names
    for entry in names:
        state = copy.deepcopy(before.state_dict())
        if TENSORS[how] is None:
            del state["state"][0][entry]
        elif how == "transposed" and state["state"][0][entry].ndim < 2:
            continue
        else:
            state["state"][0][entry] = TENSORS[how](state["state"][0][entry])
        if how == "removed" and entry == "lookahead_slow_buff":  # it begins after the sixth step
            continue
        with pytest.raises(ValueError, match=r"which no step leaves behind|it lacks|of several types"):
            after.load_state_dict(finite(state))
    move(after, weights)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("state"), lambda s: s.update(state=[]), lambda s: s.update(param_groups=None),
        lambda s: s["param_groups"].pop(), lambda s: s["param_groups"][0].update(params=[0]),
        lambda s: s["param_groups"][0].update(params=[0, 0]), lambda s: s["param_groups"][0].update(params="01"),
        lambda s: s["param_groups"][0].update(params=[True, 1]), lambda s: s["state"].update({99: {}}),
        lambda s: s["state"].update({"x": {}}), lambda s: s["state"].update({0: [1]}),
        lambda s: s["param_groups"][0].update(lr=float("nan")), lambda s: s["param_groups"][0].update(lr="x"),
        lambda s: s["param_groups"][0].update(weight_decay=[{}]), lambda s: s["param_groups"][0].update(eps=0.5),
        lambda s: s["param_groups"][0].update(maximize=True), lambda s: s["param_groups"][0].update(fused="on"),
        lambda s: s["param_groups"][0].pop("eps"), lambda s: s["param_groups"][0].update(betas=(0.9, "x")),
        lambda s: s["state"][0].update(step=-1), lambda s: s["state"][0].update(step=torch.tensor(float("nan"))),
        lambda s: s["state"][0].update(step=torch.ones(2)), lambda s: s["state"][0].update(step=3),
        lambda s: s["state"][0].update(step=torch.tensor(1e30)),
    ],
)  # fmt: skip
def test_no_other_form_of_a_state_is_loaded(change):
    before, _ = made("adamw")
    after, weights = made("adamw", steps=0)
    state = copy.deepcopy(before.state_dict())
    change(state)
    with pytest.raises(ValueError, match=r"."):
        after.load_state_dict(state)
    assert not after.state
    move(after, weights)
