"""From checkpoints to detectron2's names: the whole backbone, unchanged, or a sentence."""

import importlib.util
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from conftest import ROOT, environment
from safetensors.torch import save_file
from torch.nn import functional as F

from moco.errors import UserError
from moco.models.encoder import build_encoder
from moco.weights.detectron2_names import convert, detectron2_name, pixels_of, write_pickle

SCRIPT = ROOT / "detection" / "convert-pretrain-to-detectron2.py"


@pytest.fixture(scope="module")
def moco_file(resnet50, tmp_path_factory):
    path = tmp_path_factory.mktemp("moco") / "checkpoint_0199.pth.tar"
    entries = {f"module.encoder_{x}.{name}": v for x in "qk" for name, v in resnet50.state_dict().items()}
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": {**entries, "module.queue": torch.zeros(128, 8)}}, path)
    return path


def test_images_are_normalised_as_in_training(moco_file, tmp_path):
    assert pixels_of(str(moco_file)) == []  # upstream's file does not say
    state = torch.load(moco_file, weights_only=True)
    own = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    for changed, expected in (({}, []), ({"mean": [0.5, 0.4, 0.2]}, ["MODEL.PIXEL_MEAN", "[127.5, 102.0, 51.0]"])):
        torch.save({**state, "run": {"images": {**own, **changed}}}, tmp_path / "c.pth.tar")
        assert pixels_of(str(tmp_path / "c.pth.tar")) == expected


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("conv1.weight", "stem.conv1.weight"),
        ("bn1.running_var", "stem.conv1.norm.running_var"),
        ("layer1.0.conv3.weight", "res2.0.conv3.weight"),
        ("layer4.2.bn3.bias", "res5.2.conv3.norm.bias"),
        ("layer2.0.downsample.0.weight", "res3.0.shortcut.weight"),
        ("layer3.0.downsample.1.running_mean", "res4.0.shortcut.norm.running_mean"),
    ],
)
def test_names(ours, theirs):
    assert detectron2_name(ours) == theirs


def stage(x, weights, name, stride):
    """A stage of detectron2's BottleneckBlocks with STRIDE_IN_1X1 False, written with its parameter names."""

    def conv(x, name, **options):
        x = F.conv2d(x, weights[f"{name}.weight"], **options)
        n = f"{name}.norm"
        return F.batch_norm(
            x, weights[f"{n}.running_mean"], weights[f"{n}.running_var"], weights[f"{n}.weight"], weights[f"{n}.bias"]
        )

    blocks = len({key.split(".")[1] for key in weights if key.startswith(name)})
    for i in range(blocks):
        step = stride if i == 0 else 1
        out = F.relu(conv(x, f"{name}.{i}.conv1"))
        out = F.relu(conv(out, f"{name}.{i}.conv2", stride=step, padding=1))
        out = conv(out, f"{name}.{i}.conv3")
        x = F.relu(out + (conv(x, f"{name}.{i}.shortcut", stride=step) if i == 0 else x))
    return x


def test_every_stage_computes_what_the_encoder_does(resnet50, moco_file):
    weights = convert(str(moco_file))
    assert len(weights) == 53 * 5  # 53 convolutions, each with four tensors of its norm
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        x = resnet50.maxpool(resnet50.relu(resnet50.bn1(resnet50.conv1(x))))
        for i, stride in ((1, 1), (2, 2), (3, 2), (4, 2)):
            theirs = stage(x, weights, f"res{i + 1}", stride)
            x = resnet50.get_submodule(f"layer{i}")(x)
            torch.testing.assert_close(theirs, x, rtol=1e-5, atol=1e-5)


def test_the_written_file(resnet50, moco_file, tmp_path):
    out = tmp_path / "r50.pkl"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(moco_file), str(out)], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    made = pickle.loads(out.read_bytes())
    assert made["matching_heuristics"] is True
    assert torch.equal(torch.from_numpy(made["model"]["stem.conv1.weight"]), resnet50.conv1.weight.detach())


def test_torchvision_files_and_resnet101(tmp_path):
    path = tmp_path / "r101.pth"
    torch.save(build_encoder("resnet101", 1000).state_dict(), path)
    assert "res4.22.conv1.weight" in convert(str(path))


def test_what_is_no_resnet_50_is_a_sentence(resnet50, tmp_path):
    partial = tmp_path / "partial.pth"
    torch.save({k: v for k, v in resnet50.state_dict().items() if "layer4" not in k}, partial)
    with pytest.raises(UserError, match="lacks layer4.0.conv1.weight"):
        convert(str(partial))
    small = tmp_path / "r18.pth"
    torch.save(build_encoder("resnet18", 10).state_dict(), small)
    with pytest.raises(UserError, match="r18.pth is a resnet18; detectron2 gets a resnet50 or a resnet101 from here"):
        convert(str(small))
    for side, told in ((3, r"conv1.weight is \(64, 3, 3, 3\).*; detectron2's ResNet is the plain.* --stem imagenet"),
                       (7, "conv1.weight is all zeros, and no image passes it; take another")):  # fmt: skip
        torch.save({**resnet50.state_dict(), "conv1.weight": torch.zeros(64, 3, side, side)}, partial)
        with pytest.raises(UserError, match=told) as caught:
            convert(str(partial))
        assert "-a resnet50" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be written"):
        write_pickle({}, str(small / "below a file" / "x.pkl"))


def test_what_detectron2s_resnet_cannot_compute_is_a_sentence(resnet50, tmp_path):
    places = {"conv1": "0", "bn1": "1", **{f"layer{i}": str(i + 1) for i in range(1, 5)}}  # as lightly's own ResNet has
    bare, broken = {}, {}
    for name, value in resnet50.state_dict().items():
        first, _, rest = name.partition(".")
        if first in places:
            bare[f"backbone.{places[first]}.{rest.replace('downsample', 'shortcut')}"] = value
            broken[name] = value - 2 if name == "layer3.0.bn2.running_var" else value
    torch.save({"state_dict": bare}, tmp_path / "lightly.ckpt")
    torch.save(broken, tmp_path / "broken.pth")
    sentence = "lightly.ckpt is of a network with neither ReLU nor max-pool after bn1.*, which detectron2's ResNet"
    with pytest.raises(UserError, match=sentence):
        convert(str(tmp_path / "lightly.ckpt"))
    with pytest.raises(UserError, match="layer3.0.bn2.running_var holds a negative variance; take another"):
        convert(str(tmp_path / "broken.pth"))


def test_files_without_a_whole_resnet_end_with_code_2_and_one_sentence(moco_file, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("convert_main", SCRIPT)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    state = torch.load(moco_file, weights_only=True)["state_dict"]
    head = {name: value for name, value in state.items() if ".fc." in name}
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict()
    for name, content, words in (
        ("head.pth", {"state_dict": head}, "lacks conv1.weight, bn1.weight, bn1.bias and"),
        ("vit.pth", {"model": vit}, "is a vit_tiny_patch16_224; detectron2 gets a resnet50 or a resnet101 from here."),
        ("deep.pth", {"arch": "resnet101", "state_dict": state}, "lacks layer3.6.conv1.weight"),
    ):
        torch.save(content, tmp_path / name)
        assert script.main([str(tmp_path / name), str(tmp_path / "out.pkl")]) == 2
        assert words in one_sentence(capsys)
    (tmp_path / "cut.pth").write_bytes(moco_file.read_bytes()[:100_000])
    assert script.main([str(tmp_path / "cut.pth"), str(tmp_path / "out.pkl")]) == 2
    assert "cut.pth" in one_sentence(capsys)
    assert script.main(["nowhere", "x"]) == 2
    assert one_sentence(capsys) == "error: no checkpoint at nowhere; check the path.\n"
    assert not (tmp_path / "out.pkl").exists()


def one_sentence(capsys) -> str:
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def test_safetensors_and_timm_names(resnet50, tmp_path):
    tensors = {name: value for name, value in resnet50.state_dict().items() if not name.startswith("fc.")}
    save_file(tensors, tmp_path / "r50.safetensors")
    found = convert(str(tmp_path / "r50.safetensors"))
    assert torch.equal(found["res5.2.conv3.weight"], resnet50.layer4[2].conv3.weight.detach())
    torch.save({"arch": "resnet50.a1_in1k", "state_dict": tensors}, tmp_path / "timm.pth")
    assert convert(str(tmp_path / "timm.pth")).keys() == found.keys()
