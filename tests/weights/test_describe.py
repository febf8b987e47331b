"""moco.describe tells a healthy checkpoint from each way in which one can be broken."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
import torchvision
from conftest import TINY, load
from torch import nn

from moco import describe as describe_door
from moco import run_folder
from moco.config import MoCoConfig
from moco.models.encoder import build_encoder
from moco.models.moco import MoCo
from moco.train import checkpoint

K, C = 24, 16


@pytest.fixture(scope="module")
def healthy() -> dict:
    """A packed training state that looks trained: statistics moved, keys behind the queries, part of a queue."""
    torch.manual_seed(0)
    encoders = [build_encoder("test_resnet", C, mlp=True, size=32) for _ in range(2)]
    config = MoCoConfig(C=C, K=K, m=0.9, T=0.2, mean=(0.5,) * 3, std=(0.2,) * 3)
    model = MoCo(encoders[0], encoders[1], config, seed=0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 1.5)
        for value in model.encoder_q.parameters():
            value.add_(0.01 * torch.randn_like(value))
    model.queue_ids[:10] = torch.arange(10)
    model.queue_ptr.fill_(10)
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9)
    model.encoder_q(torch.randn(4, 3, 32, 32)).sum().backward()
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    run = {"step": 30, "draw": 30, "batch": 0, "seed": 0, "ema_due": True, "bad_steps": 0, "bad_images": {"seen": []}}
    return checkpoint.pack(model, optimizer, scaler, "test_resnet", 3, run)


def said(state: dict, tmp_path, capsys) -> tuple[int, str]:
    torch.save(state, tmp_path / "c.pth.tar")
    code = describe_door.main([str(tmp_path / "c.pth.tar")])
    return code, capsys.readouterr().out


def test_a_runs_own_checkpoint_is_sane(in_process, image_folder, tmp_path, capsys):
    words = ["--method", "synco", "--n-hard", 8, "--epochs", 2, "--save-every", 2, "--save-dir", tmp_path, image_folder]
    assert in_process(*TINY, *words) == 0
    capsys.readouterr()
    path = run_folder.newest(str(tmp_path))
    assert path
    assert describe_door.main([path]) == 0
    text = capsys.readouterr().out
    state = load(tmp_path)
    for part in (
        f"{path}: pretraining checkpoint of this project",
        "test_resnet, named in the file",
        f"head {state['state_dict']['module.encoder_q.fc.weight'].shape[1]}-16",
        "epoch 2, step 6, batch 0, seed 3, method synco",
        "encoder_q (", "queue_ids (1)", "all weights are finite",
        "queue: K = 20, C = 16, filled by images: 20 rows, 20 rows of unit length",
        "from encoder_q, relative to its norm",
        "optimizer: 1 groups, lr 0.03,",
        "flags of its run: --size 16, --channels 3, --mean 0.485 0.456 0.406,", "--method synco,", "--wd 0.0001",
        "data: 24 images of ", ", fingerprint ", f"written by torch {torch.__version__} on ", ", 1 thread\n",
    ):  # fmt: skip
        assert part in text, text
    assert text.endswith("ok\n")
    assert not [
        flag for flag in ("--tau-plus", "--moco-mlp-dim", "--mochi") if f"{flag} " in text
    ]  # other methods' flags
    (tmp_path / "log_settings.json").unlink()
    assert describe_door.main([path]) == 0
    assert "seed 3, method synco\n" in capsys.readouterr().out  # the file says it too


def test_the_distance_of_the_keys_and_the_fill_of_the_queue(healthy, tmp_path, capsys):
    code, text = said(healthy, tmp_path, capsys)
    assert code == 0
    assert "filled by images: 10 rows, 24 rows of unit length" in text
    square = norm = 0.0
    encoder = build_encoder("test_resnet", C, mlp=True, size=32)
    for name, _ in encoder.named_parameters():
        q, k = (healthy["state_dict"][f"module.encoder_{x}.{name}"] for x in "qk")
        for a, b in zip(q.flatten().tolist(), k.flatten().tolist(), strict=True):
            square, norm = square + (a - b) ** 2, norm + a * a
    found = re.search(r"encoder_k is (\S+) from", text)
    assert found
    assert float(found.group(1)) == pytest.approx((square / norm) ** 0.5, rel=1e-2)


def entry(name: str, change: Callable[[torch.Tensor], object]) -> Callable[[dict], object]:
    return lambda state: change(state["state_dict"][f"module.{name}"])


def equal_keys(state: dict) -> None:
    for name, value in state["state_dict"].items():
        if ".encoder_k." in name:
            value.copy_(state["state_dict"][name.replace("encoder_k", "encoder_q")])


def far_keys(state: dict) -> None:
    for name, value in state["state_dict"].items():
        if ".encoder_k." in name and value.is_floating_point():
            value.mul_(-1)


def every_variance(number: float) -> Callable[[dict], None]:
    def change(state: dict) -> None:
        for name, value in state["state_dict"].items():
            if name.endswith("running_var"):
                value.fill_(number)
            if name.endswith("running_mean"):
                value.zero_()

    return change


def nan_momentum(state: dict) -> None:
    next(iter(state["optimizer"]["state"].values()))["momentum_buffer"].fill_(float("nan"))


WEIGHT, VARIANCE = "encoder_q.layer1.0.conv1.weight", "encoder_q.layer1.0.bn1.running_var"
BROKEN = {
    "1 tensors hold NaN": entry(WEIGHT, lambda w: w[0].fill_(float("nan"))),
    "infinity, the first is encoder_k.fc.0.bias": entry("encoder_k.fc.0.bias", lambda w: w.fill_(torch.inf)),
    "1 of 24 queue rows are not of unit length": entry("queue", lambda q: q[5].mul_(1.01)),
    "2 of 24 queue rows are not of unit length": entry("queue", lambda q: q[5:7].fill_(float("nan"))),
    "the queue's pointer 24 lies outside": entry("queue_ptr", lambda p: p.fill_(K)),
    f"1 tensors hold int64 numbers, the first is {WEIGHT}": entry(WEIGHT, lambda w: setattr(w, "data", w.long())),
    f"1 tensors hold complex64 numbers, the first is {VARIANCE}": entry(
        VARIANCE, lambda v: setattr(v, "data", v.to(torch.complex64))
    ),
    f"1 tensors hold a negative variance, the first is {VARIANCE}": entry(VARIANCE, lambda v: v[0].fill_(-1e-3)),
    "has no channel with variance (1 layers): collapsed": entry(VARIANCE, lambda v: v.zero_()),
    "never saw a batch": every_variance(1.0),
    "encoder_k equals encoder_q after training": equal_keys,
    "encoder_k no longer follows encoder_q": far_keys,
    "encoder_k lacks fc.0.weight": lambda state: state["state_dict"].pop("module.encoder_k.fc.0.weight"),
    "does not fit the encoder: it lacks layer1": lambda state: state["state_dict"].pop(f"module.{WEIGHT}"),
    "no torchvision or timm network has this name": lambda state: state.update(arch="resnet19"),
    "the queue's width 15 is not the encoder's 16": lambda state: state["state_dict"].update(
        {"module.queue": nn.functional.normalize(torch.randn(K, C - 1), dim=1)}
    ),
    "1 tensors of the optimizer hold NaN": nan_momentum,
}


@pytest.mark.parametrize("words", list(BROKEN))
def test_each_kind_of_damage_is_named(healthy, tmp_path, capsys, words):
    state = copy.deepcopy(healthy)
    BROKEN[words](state)
    code, text = said(state, tmp_path, capsys)
    assert code == 1
    odd = [line for line in text.splitlines() if line.startswith("warning: ")]
    assert any(words in line for line in odd), text
    assert text.endswith(f"{len(odd)} warnings\n")


def test_a_dead_channel_is_counted_and_no_damage(healthy, tmp_path, capsys):
    state = copy.deepcopy(healthy)
    entry(VARIANCE, lambda v: v[:3].zero_())(state)
    code, text = said(state, tmp_path, capsys)
    assert (code, "3 channels without variance" in text) == (0, True)


def official(queue: tuple[int, int], mlp: bool, dim: int) -> dict:
    q = torchvision.models.resnet18(num_classes=C)
    if mlp:
        q.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), q.fc)
    entries = {f"module.encoder_q.{name}": value for name, value in q.state_dict().items()}
    entries |= {f"module.encoder_k.{n}": v * 0.99 if v.is_floating_point() else v for n, v in q.state_dict().items()}
    entries["module.queue"] = nn.functional.normalize(torch.randn(queue), dim=dim)
    entries["module.queue_ptr"] = torch.zeros(1, dtype=torch.long)
    for name, value in entries.items():
        if name.endswith("running_mean"):
            value += 0.1
    return {"epoch": 200, "arch": "resnet18", "state_dict": entries, "optimizer": {}}


@pytest.mark.parametrize(
    ("queue", "mlp", "dim", "kind", "code"),
    [
        ((C, K), False, 0, "MoCo v1", 0),
        ((C, K), True, 0, "MoCo v2", 0),
        ((K, C), True, 1, "SynCo as released", 0),
        ((K, C), True, 0, "SynCo as released", 1),  # its queue as it is born: the other axis has unit length
    ],
)
def test_upstreams_files(tmp_path, capsys, queue, mlp, dim, kind, code):
    found, text = said(official(queue, mlp, dim), tmp_path, capsys)
    assert f"pretraining checkpoint of {kind}\n" in text
    assert f"queue: K = {K}, C = {C}, filled by images: not recorded" in text
    assert found == code, text
    assert ("queue rows are not of unit length" in text) == bool(code)


def plain(prefix: str = "") -> dict:
    return {prefix + name: value for name, value in torchvision.models.resnet18(num_classes=10).state_dict().items()}


KINDS = {
    "weights alone": lambda: plain(),
    "classifier's checkpoint": lambda: {"state_dict": plain("module."), "best_acc1": 12.5, "arch": "resnet18"},
    "MoCo v3": lambda: {"state_dict": plain("module.base_encoder.") | {"module.predictor.0.weight": torch.ones(2, 2)}},
    "SupContrast": lambda: {"model": plain("encoder.") | {"head.0.weight": torch.ones(2, 2)}},
    "solo-learn": lambda: {"state_dict": plain("backbone.") | {"classifier.weight": torch.ones(2, 2)}},
    "lightly": lambda: {"state_dict": plain("backbone."), "pytorch-lightning_version": "2.4.0"},
    "DINO or iBOT": lambda: {"student": plain("module.backbone."), "teacher": plain("backbone.")},
    "teacher of DINOv2": lambda: {"teacher": plain("backbone.") | {"dino_head.last_layer.weight": torch.ones(2, 2)}},
    "of MAE": lambda: {"model": plain() | {"decoder_embed.weight": torch.ones(2, 2)}},
    "SwAV or DeepCluster": lambda: {"state_dict": plain("module.") | {"module.prototypes.weight": torch.ones(2, 2)}},
    "of BYOL": lambda: plain("online_encoder.net.") | plain("target_encoder.net."),
    "Barlow Twins": lambda: {"model": plain("module.backbone.") | {"module.projector.0.weight": torch.ones(2, 2)}},
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_other_files_are_told_apart(tmp_path, capsys, kind):
    code, text = said(KINDS[kind](), tmp_path, capsys)
    assert kind in text.splitlines()[0]
    assert "architecture: resnet18" in text
    assert "no optimizer: it cannot be resumed" in text
    assert code == 0, text


def test_an_unknown_architecture_is_not_damage(tmp_path, capsys):
    code, text = said({"x": torch.ones(3)}, tmp_path, capsys)
    assert (code, "of no known one" in text) == (0, True)


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("x"),
                                  lambda p: torch.save({}, p), lambda p: torch.save([1], p)])  # fmt: skip
def test_what_cannot_be_read_is_one_sentence(tmp_path, capsys, make):
    make(tmp_path / "c.pth.tar")
    try:
        code = describe_door.main([str(tmp_path / "c.pth.tar")])
    except SystemExit as end:  # a folder without checkpoints is refused as a wrong flag is
        code = end.code
    assert code == 2
    out = capsys.readouterr()
    assert (out.out, out.err.count("\n")) == ("", 1)
