"""What moco.export writes loads in the other tool, strictly, and computes the same."""

import json
import os
import pickle

import pytest
import timm
import torch
import torchvision
from support.layouts import OwnResNet, by_position, lightly
from torch import nn

from moco import data
from moco import export as export_door
from moco.models.encoder import build_encoder, features
from moco.weights import export
from moco.weights.detectron2_names import convert
from moco.weights.layouts import CARD
from moco.weights.read import open_backbone

C = 16


def shaken(encoder: nn.Module) -> nn.Module:
    """BatchNorm's statistics away from their first values, as after training."""
    for norm in (m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -0.1, 0.1)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    return encoder.eval()


def moco_file(path, arch: str, **options) -> nn.Module:
    """Write a pretraining checkpoint of ours; returns its query encoder."""
    torch.manual_seed(0)
    encoder = shaken(build_encoder(arch, C, mlp=True, **options))
    entries = {f"module.encoder_{x}.{name}": v for x in "qk" for name, v in encoder.state_dict().items()}
    torch.save({"epoch": 200, "arch": arch, "state_dict": entries, "optimizer": {}}, path)
    return encoder


def images(channels: int = 3, size: int = 32, count: int = 2) -> torch.Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(5))


def run_lines(printed: str) -> nn.Module:
    """Execute the lines of Python that export printed, as a user would paste them."""
    lines = printed[printed.index("import torch") :]
    names: dict = {}
    exec(lines, names)
    return names["model"].eval()


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one.flatten(1), other.flatten(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arch", "options", "to"),
    [
        ("resnet18", {"stem": "imagenet", "size": 32}, "torchvision"),
        ("resnet18", {"stem": "imagenet", "size": 32}, "timm"),
        ("resnet18", {"size": 32, "in_chans": 1}, "torchvision"),
        ("resnet18", {"size": 32, "in_chans": 1}, "timm"),
        ("timm/resnet18", {"stem": "imagenet", "size": 32}, "torchvision"),
    ],
    ids=["7x7", "7x7 timm", "grey 3x3", "grey 3x3 timm", "from timm"],
)
def test_resnets_in_both_libraries(tmp_path, capsys, arch, options, to):
    encoder = moco_file(tmp_path / "c.pth.tar", arch, **options)
    assert export_door.main([str(tmp_path / "c.pth.tar"), "--to", to, "--size", "32"]) == 0
    assert (tmp_path / f"c.{to}.pth").exists()
    x = images(options.get("in_chans", 3))
    with torch.no_grad():
        same(run_lines(capsys.readouterr().out)(x), features(encoder, x))


@pytest.mark.parametrize(
    ("arch", "to", "size"),
    [
        ("vit_tiny_patch16_224", "timm", 32),
        ("test_resnet", "timm", 32),
        ("deit_tiny_distilled_patch16_224", "timm", 32),  # two heads: ours sits beside the backbone
        ("mobilenet_v3_small", "torchvision", 96),
    ],
)
def test_other_networks_in_their_own_library(tmp_path, capsys, arch, to, size):
    encoder = moco_file(tmp_path / "c.pth.tar", arch, size=size)
    assert export_door.main([str(tmp_path / "c.pth.tar"), "--to", to, "--size", str(size)]) == 0
    x = images(size=size)
    with torch.no_grad():
        same(run_lines(capsys.readouterr().out)(x), features(encoder, x))


def test_moco_v3s_vit_keeps_its_heads_in_every_kind(tmp_path, capsys):
    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch16_224", num_heads=12, img_size=32, num_classes=0).eval()
    with torch.no_grad():
        network.pos_embed[0, 0] = 0
    entries = {f"module.base_encoder.{name}": value for name, value in network.state_dict().items()}
    path = str(tmp_path / "v3.pth.tar")
    torch.save({"epoch": 300, "arch": "vit_small", "state_dict": entries}, path)
    x = images()
    with torch.no_grad():
        expected = network(x)
    assert export_door.main([path, "--to", "timm"]) == 0
    with torch.no_grad():
        same(run_lines(capsys.readouterr().out)(x), expected)
    assert export_door.main([path, "--to", "features"]) == 0
    assert json.loads((tmp_path / "v3.features.json").read_text())["changes"] == {"num_heads": 12}
    same(features(open_backbone(str(tmp_path / "v3.features.pt")).encoder, x).detach(), expected)


@pytest.mark.parametrize(
    ("to", "stem"), [*((to, 3) for to in export.SUFFIXES), *((to, 7) for to in ("torchvision", "timm", "features"))]
)
def test_lightlys_own_resnet_stays_without_its_relu_or_is_refused(tmp_path, capsys, to, stem):
    torch.manual_seed(0)
    state, network = lightly(lambda: by_position(OwnResNet(stem)))
    path = tmp_path / "c.ckpt"
    torch.save(state, path)
    x = images()
    with torch.no_grad():
        expected = network.eval()(x)  # type: ignore[attr-defined]
    words = [str(path), "--to", to, "--size", "32"]
    if to in ("detectron2", "hub"):
        sentence = {"detectron2": "not for resnet18", "hub": "which timm.create_model cannot build"}[to]
        assert sentence in refused(capsys, tmp_path, *words)
        return
    assert export_door.main(words) == 0
    said = capsys.readouterr().out
    out = str(tmp_path / f"c{export.SUFFIXES[to]}")
    if to == "onnx":
        same(in_onnxruntime(out, x), expected)
        return
    with torch.no_grad():
        if to in ("torchvision", "timm"):
            assert "the file cannot say so: the lines below give it neither ReLU nor max-pool" in said
            same(run_lines(said)(x), expected)
        again = open_backbone(out)  # the card tells it
        same(features(again.encoder, x), expected)
    assert again.changes == {"bare_stem": 1}


def test_vits_of_the_two_libraries_are_renamings():
    with torch.device("meta"):
        for ours, theirs in export.TORCHVISION_VITS.items():
            one = torchvision.models.get_model(ours).state_dict()
            other = timm.create_model(theirs, num_classes=1000).state_dict()
            assert {export.timm_name(n): v.shape for n, v in one.items()} == {n: v.shape for n, v in other.items()}
            assert export.library_arch(ours, "timm") == f"timm/{theirs}"
            assert export.library_arch(theirs, "torchvision") == ours


def test_vits_compute_the_same_after_renaming():
    torch.manual_seed(0)
    ours = torchvision.models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=7
    ).eval()
    nn.init.normal_(ours.heads.head.weight)
    theirs = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=7).eval()
    theirs.load_state_dict(export._renamed(ours.state_dict(), theirs))
    x = images()
    with torch.no_grad():
        same(theirs(x), ours(x))
    back = export._renamed(theirs.state_dict(), ours)
    assert all(torch.equal(value, back[name]) for name, value in ours.state_dict().items())


def classifier(path, network: nn.Module, arch: str) -> nn.Module:
    """Write what main_lincls.py (ours or upstream's) writes; returns the network."""
    entries = {f"module.{name}": value for name, value in shaken(network).state_dict().items()}
    torch.save({"epoch": 3, "arch": arch, "state_dict": entries, "best_acc1": 50.0, "optimizer": {}}, path)
    return network


@pytest.mark.parametrize("to", ["torchvision", "timm"])
def test_a_classifiers_logits_with_head_keep(tmp_path, capsys, to):
    network = classifier(tmp_path / "c.pth.tar", torchvision.models.resnet18(num_classes=5), "resnet18")
    assert export_door.main([str(tmp_path / "c.pth.tar"), "--to", to, "--head", "keep", "--size", "64"]) == 0
    with torch.no_grad():
        same(run_lines(capsys.readouterr().out)(images()), network(images()))


def in_onnxruntime(path, x: torch.Tensor) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def test_onnx_takes_any_batch_size(tmp_path, capsys):
    import onnx

    encoder = moco_file(tmp_path / "c.pth.tar", "test_vit", size=64)
    words = [str(tmp_path / "c.pth.tar"), "--to", "onnx", "--size", "64", "--out", str(tmp_path / "o.onnx")]
    assert export_door.main(words) == 0
    for count in (1, 2, 5):
        x = images(size=64, count=count)
        with torch.no_grad():
            same(in_onnxruntime(tmp_path / "o.onnx", x), features(encoder, x))
    assert "onnxruntime computes the same" in capsys.readouterr().out
    props = {p.key: p.value for p in onnx.load(str(tmp_path / "o.onnx")).metadata_props}
    card = {name: json.loads(props["card"])[name] for name in ("arch", "size", "channels", "mean", "std")}
    mean, std = data.channel_statistics(None, 3)
    assert card == {"arch": "test_vit", "size": 64, "channels": 3, "mean": mean, "std": std}


def test_onnx_logits_of_a_classifier(tmp_path):
    network = classifier(tmp_path / "c.pth.tar", timm.create_model("test_resnet", num_classes=5), "test_resnet")
    assert export_door.main([str(tmp_path / "c.pth.tar"), "--to", "onnx", "--head", "keep", "--size", "64"]) == 0
    with torch.no_grad():
        same(in_onnxruntime(tmp_path / "c.onnx", images(size=64)), network(images(size=64)))


@pytest.mark.parametrize(("to", "suffix"), [("safetensors", ".safetensors"), ("features", ".features.pt")])
def test_own_names_and_the_card_rebuild_the_encoder(tmp_path, to, suffix):
    encoder = moco_file(tmp_path / "c.pth.tar", "test_convnext", size=64)  # no tensor tells this name: the card does
    words = [str(tmp_path / "c.pth.tar"), "--to", to, "--size", "64", "--dataset", "cifar10"]
    assert export_door.main(words) == 0
    again = open_backbone(str(tmp_path / f"c{suffix}"))
    card = again.file.settings
    mean, std = data.channel_statistics("cifar10", 3)
    assert card == {
        "kind": CARD, "arch": "test_convnext", "stem": "imagenet", "size": 64, "channels": 3, "mean": mean, "std": std,
        "width": features(encoder, images(size=64)).shape[1], "changes": {}, "source": "c.pth.tar", "epoch": 200,
    }  # fmt: skip
    assert again.size == 64
    assert torch.equal(features(again.encoder, images(size=64)), features(encoder, images(size=64)))
    own = encoder.state_dict()
    head = f"{encoder.head_name}."
    assert set(again.file.tensors) == {name for name in own if not name.startswith(head)}
    assert all(torch.equal(value, own[name]) for name, value in again.file.tensors.items())


def test_features_are_a_plain_state_dict(tmp_path):
    encoder = moco_file(tmp_path / "c.pth.tar", "resnet18", size=32)
    assert export_door.main([str(tmp_path / "c.pth.tar"), "--to", "features", "--out", str(tmp_path / "f.pt")]) == 0
    network = torchvision.models.resnet18()
    network.conv1, network.maxpool, network.fc = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity(), nn.Identity()
    network.load_state_dict(torch.load(tmp_path / "f.pt", weights_only=True))
    with torch.no_grad():
        same(network.eval()(images()), features(encoder, images()))


def test_the_card_takes_the_runs_own_settings(tmp_path):
    moco_file(tmp_path / "c.pth.tar", "resnet18", size=32)
    state = torch.load(tmp_path / "c.pth.tar", weights_only=True)
    torch.save({**state, "run": {"seed": 0}}, tmp_path / "c.pth.tar")
    settings = {"arch": "resnet18", "dataset": "cifar100", "size": 40, "mean": None, "std": None, "method": "synco"}
    (tmp_path / "log_settings.json").write_text(json.dumps(settings))
    assert export_door.main([str(tmp_path / "c.pth.tar"), "--to", "features"]) == 0
    card = json.loads((tmp_path / "c.features.json").read_text())
    assert (card["size"], card["mean"]) == (40, data.channel_statistics("cifar100", 3)[0])
    settings["arch"] = "resnet50"  # another run's, in the same folder
    (tmp_path / "log_settings.json").write_text(json.dumps(settings))
    assert export_door.main([str(tmp_path / "c.pth.tar"), "--to", "features"]) == 0
    card = json.loads((tmp_path / "c.features.json").read_text())
    assert (card["size"], card["mean"]) == (32, data.channel_statistics(None, 3)[0])


def test_detectron2_has_what_detections_own_script_writes(tmp_path):
    path, out = str(tmp_path / "c.pth.tar"), tmp_path / "c.detectron2.pkl"
    moco_file(path, "resnet50")
    assert export_door.main([path, "--to", "detectron2", "--size", "64"]) == 0
    expected, made = convert(path), pickle.loads(out.read_bytes())["model"]
    assert set(made) == set(expected)
    assert all(torch.equal(torch.from_numpy(made[name]), value) for name, value in expected.items())
    card = json.loads((tmp_path / "c.detectron2.json").read_text())
    mean, std = data.channel_statistics(None, 3)
    assert [card[name] for name in ("arch", "size", "mean", "std")] == ["resnet50", 64, mean, std]


# --------------------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    moco_file(folder / "tiny.pth.tar", "test_resnet", size=64)
    moco_file(folder / "r18.pth.tar", "resnet18", size=32)
    (folder / "cut.pth.tar").write_bytes((folder / "tiny.pth.tar").read_bytes()[:9000])
    (folder / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (folder / "text.pth").write_text("no checkpoint")
    torch.save({}, folder / "empty.pth")
    torch.save({"weights": {"x": 1}}, folder / "other.pth")
    torch.save({"x": torch.zeros(3)}, folder / "unknown.pth")
    (folder / "result.json").write_text('{"acc1": 50.0}')
    network = torchvision.models.resnet18(num_classes=5)
    network.fc.weight.data[0] = torch.nan
    torch.save(network.state_dict(), folder / "nan_head.pth")
    network.layer1[0].conv2.weight.data[0] = torch.inf
    torch.save(network.state_dict(), folder / "inf.pth")
    (folder / "folder.pth").mkdir()
    return folder


def refused(capsys, folder, *words: str) -> str:
    before = sorted(os.listdir(folder))
    code = export_door.main([word.replace("DIR", str(folder)) for word in words])
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1), error
    assert sorted(os.listdir(folder)) == before, "something was written"
    return error


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("DIR/nowhere.pth --to timm", "no checkpoint at"),
        ("DIR/nowhere.safetensors --to timm", "no checkpoint at"),
        ("DIR/cut.pth.tar --to timm", "truncated, damaged"),
        ("DIR/cut.safetensors --to timm", "no readable safetensors"),
        ("DIR/text.pth --to timm", "no readable checkpoint"),
        ("DIR/empty.pth --to timm", "holds no weights"),
        ("DIR/other.pth --to timm", "holds no weights"),
        ("DIR/unknown.pth --to timm", "give it by -a"),
        ("DIR/tiny.pth.tar --to timm -a resnet18", "the file was trained with -a test_resnet"),
        ("DIR/r18.pth.tar --to timm -a resnet50", "lacks layer1.0.conv3.weight"),
        ("DIR/r18.pth.tar --to timm -a resnet19", "no torchvision or timm network has this name"),
        ("DIR/r18.pth.tar --to timm --stem imagenet", "(64, 3, 3, 3) there and (64, 3, 7, 7) here"),
        ("DIR/tiny.pth.tar --to torchvision", "torchvision has no network test_resnet"),
        ("DIR/r18.pth.tar --to detectron2", "not for resnet18 with cifar stem"),
        ("DIR/r18.pth.tar --to timm --out DIR/none/x.pth", "make it first"),
        ("DIR/r18.pth.tar --to timm --out DIR/folder.pth", "is a folder"),
        ("DIR/r18.pth.tar --to timm --out DIR/r18.pth.tar", "is the checkpoint itself"),
        ("DIR/r18.pth.tar --to timm --out DIR/result.pth", "result.json, which is something else; choose"),
        ("DIR/r18.pth.tar --to features --out DIR/other.json", "other.json, which is something else"),
        ("DIR/r18.pth.tar --to timm --head keep", "no head of one linear layer"),
        ("DIR/nan_head.pth --to timm --head keep", "cannot be used: fc.weight holds NaN or infinity"),
        *((f"DIR/inf.pth --to {to}", "layer1.0.conv2.weight holds NaN or infinity; take") for to in export.SUFFIXES),
        ("DIR/r18.pth.tar --to features --head keep", "no meaning"),
        ("DIR/r18.pth.tar --to features --mean 0.5", "one value a channel"),
    ],
)
def test_what_cannot_be_exported_is_one_sentence(tiny, capsys, words, sentence):
    assert sentence in refused(capsys, tiny, *words.split())


def test_a_folder_without_a_run_is_one_sentence(tiny, capsys):
    with pytest.raises(SystemExit) as stopped:
        export_door.main([str(tiny / "folder.pth"), "--to", "timm"])
    assert stopped.value.code == 2
    assert "holds no checkpoint of a run" in capsys.readouterr().err


def test_a_network_of_the_same_name_and_another_make_is_refused(tmp_path, capsys):
    moco_file(tmp_path / "c.pth.tar", "mobilenet_v3_large", size=64)
    assert "timm has no network" in refused(capsys, tmp_path, "DIR/c.pth.tar", "--to", "timm")
    moco_file(tmp_path / "c.pth.tar", "efficientnet_b0", size=64)
    assert "other entries: " in refused(capsys, tmp_path, "DIR/c.pth.tar", "--to", "timm", "--size", "64")


@pytest.mark.parametrize("to", ["torchvision", "onnx"])
def test_what_computes_something_else_is_not_written(tiny, capsys, monkeypatch, to):
    monkeypatch.setattr(export, "_gap", lambda one, other: float("nan"))
    source = "r18.pth.tar" if to == "torchvision" else "tiny.pth.tar"
    assert "nothing was written" in refused(capsys, tiny, f"DIR/{source}", "--to", to, "--size", "64")


def test_the_gap_sees_a_small_difference():
    one = torch.tensor([[1.0, -4.0]])
    assert export._gap(one, one + torch.tensor([[0.0, 1e-3]])) == pytest.approx(2.5e-4, rel=1e-3)
    assert export._gap(one, one[:, :1]) > export.ONNX_TOLERANCE


def test_a_missing_extra_is_named(tiny, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    assert "pip install '.[export]'" in refused(capsys, tiny, "DIR/tiny.pth.tar", "--to", "onnx")


@pytest.mark.parametrize("to", ["timm", "features", "safetensors", "detectron2"])
def test_an_older_file_is_replaced_whole_or_not_at_all(tiny, tmp_path, capsys, monkeypatch, to):
    source, out = str(tiny / "tiny.pth.tar"), tmp_path / "out.bin"
    if to == "detectron2":
        source = str(tmp_path / "r50.pth")
        torch.save(build_encoder("resnet50", C).state_dict(), source)
    out.write_text("older")
    words = [source, "--to", to, "--out", str(out), "--size", "64"]

    def full(*paths):
        assert os.path.dirname(paths[0]) == str(tmp_path)
        assert paths[1] == str(out)
        assert os.path.getsize(paths[0]) > 100_000  # complete before the older one goes
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert export_door.main(words) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert out.read_text() == "older"
    assert list(tmp_path.glob("*.tmp")) == []
    assert export_door.main(words) == 0
    assert out.stat().st_size > 100_000
