"""A run that begins from the weights of a file: both encoders have its features before the first step."""

import json
import re

import pytest
import timm
import torch
from conftest import TINY
from support.layouts import THEIRS, moco_v3_vit, resnet
from torch import nn

from moco import cli, data, distributed
from moco.cli.common import image_options
from moco.cli.pretrain import pretrain_config
from moco.errors import UserError
from moco.models.encoder import features
from moco.train.setup import Views, build_model, open_images, view_settings
from moco.train.start import settle_start
from moco.weights.describe import describe_file
from moco.weights.read import open_backbone

SMALL = ["--moco-k", "16", "-b", "8", "--moco-mlp-dim", "32"]


def begun(path, *words, method="moco"):
    """The model of a run that begins from a file, its flags, and the line of its log."""
    queue = SMALL[:2] if method == "moco" else []
    args = cli.parse_pretrain(
        [*queue, *SMALL[2:4], "--method", method, *map(str, words), "--pretrained", str(path), "DIR"]
    )
    args = settle_start(args, None, {})
    channels = args.channels or 3
    view = Views(args.size or 32, channels, *data.channel_statistics(None, channels), "v1", data.get_preset("v1"))
    model, summary = build_model(pretrain_config(args), view, 0, 64, 8)
    return model, args, summary.splitlines()[-1]


def encoders_of(model):
    return [encoder for name in ("encoder_q", "encoder_k") if (encoder := getattr(model, name, None)) is not None]


@torch.no_grad()
def same_features(model, theirs, images):
    expected = theirs.eval()(images).flatten(1)
    for encoder in encoders_of(model):
        torch.testing.assert_close(features(encoder.eval(), images), expected, rtol=1e-5, atol=1e-5)
        assert not torch.equal(expected[0], expected[1])


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


LAYOUTS = [*THEIRS, "moco", "torchvision", "vit", "vit of moco_v3"]
OF_OTHER_METHODS = [("moco", "simclr"), ("moco", "moco_v3"), ("vit", "moco_v3"), ("vit of moco_v3", "moco_v3")]


@pytest.mark.parametrize(("layout", "method"), [*((layout, "moco") for layout in LAYOUTS), *OF_OTHER_METHODS])
def test_every_encoder_of_every_method_has_the_files_features(layout, method, tmp_path, images):
    torch.manual_seed(1)
    if layout in THEIRS:
        state, theirs = THEIRS[layout]()
    elif layout == "vit of moco_v3":
        state, theirs = moco_v3_vit()
    elif layout == "vit":
        theirs = timm.create_model("vit_small_patch16_224", img_size=32, num_classes=0)
        state = theirs.state_dict()
    else:
        theirs = resnet(nn.Linear(512, 128))
        state = theirs.state_dict()
        if layout == "moco":
            entries = {
                f"module.{part}.{name}": value for part in ("encoder_q", "encoder_k") for name, value in state.items()
            }
            state = {"arch": "resnet18", "epoch": 200, "state_dict": {**entries, "module.queue": torch.zeros(128, 16)}}
    if hasattr(theirs, "fc"):
        theirs.fc = nn.Identity()
    path = tmp_path / "theirs.ckpt"
    torch.save(state, path)
    model, args, _ = begun(path, method=method)
    assert args.arch == ("vit_small_patch16_224" if "vit" in layout else "resnet18")
    same_features(model, theirs, images)
    assert len(encoders_of(model)) == (1 if method == "simclr" else 2)


def test_the_run_draws_what_it_draws_without(tmp_path, saved):
    model, args, _ = begun(saved, "--moco-dim", 24)
    torch.manual_seed(5)
    first = begun(saved, "--moco-dim", 24)[0].encoder_q.fc.weight
    torch.manual_seed(5)
    view = Views(args.size or 32, 3, *data.channel_statistics(None, 3), "v1", data.get_preset("v1"))
    args.begin_with = ""
    without, _ = build_model(pretrain_config(args), view, 0, 64, 8)
    assert torch.equal(first, without.encoder_q.fc.weight)
    assert not torch.equal(first, model.encoder_q.fc.weight)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--moco-dim", 16], "92 of 92 tensors of encoder_q, epoch 2, its projection head among them"),
        (["--moco-dim", 24], "90 of 92 tensors of encoder_q, epoch 2; not taken: fc.weight, fc.bias; the projection "
         "head begins anew"),
        (["--moco-dim", 16, "--mlp"], "90 of 92 tensors .* the projection head begins anew"),
    ],
)  # fmt: skip
def test_a_projection_head_is_taken_where_it_fits(words, said, saved, encoder):
    model, _, line = begun(saved, *words)
    assert re.fullmatch(f"--pretrained {re.escape(saved)}: {said}", line)
    for own in encoders_of(model):
        head = dict(own.fc.named_parameters())
        fits = "among" in said
        assert ("weight" in head and torch.equal(head["weight"], encoder.fc.weight)) == fits


def test_a_classifier_as_wide_as_the_head_is_none(tmp_path):
    torch.manual_seed(2)
    network = resnet(nn.Linear(512, 128))
    torch.save(network.state_dict(), tmp_path / "file.pth")
    model, _, line = begun(tmp_path / "file.pth")
    assert "120 of 122 tensors of the file; not taken: fc.weight, fc.bias; the projection head begins anew" in line
    assert not torch.equal(model.encoder_q.fc.weight, network.fc.weight)


def test_published_weights(monkeypatch, images):
    torch.manual_seed(1)
    theirs = resnet(nn.Linear(512, 1000))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **options: dict(theirs.state_dict()))
    model, args, line = begun("torchvision:IMAGENET1K_V1", "-a", "resnet18")
    assert line.startswith(
        "--pretrained torchvision:IMAGENET1K_V1: 120 of 122 tensors of the file; not taken: fc.weight"
    )
    assert args.stem == "imagenet"  # which 32 pixels would not have
    theirs.fc = nn.Identity()
    same_features(model, theirs, images)


def test_the_files_settings_hold_where_none_is_typed(tmp_path, image_folder, in_process, capsys):
    words = [*TINY[2:], "--channels", 1, "--mean", 0.3, "--std", 0.2, "-a", "test_resnet", "--steps", 1]
    assert in_process(*words, "--save-dir", tmp_path / "first", image_folder) == 0
    capsys.readouterr()
    few = ["-b", 8, "--moco-k", 20, "-j", 0, "--knn-every", 0, "--steps", 1, "--amp", "off"]
    second = tmp_path / "second"
    assert in_process(*few, "--pretrained", tmp_path / "first", "--std", 0.25, "--save-dir", second, image_folder) == 0
    out = capsys.readouterr().out
    path = tmp_path / "first" / "checkpoint_0000_step_00000001.pth.tar"
    assert (
        f"\nsettings of {path}: -a test_resnet --stem imagenet --size 16 --channels 1 --mean 0.3 (checkpoint); " in out
    )
    assert f"--std 0.25 differs from the 0.2 that {path} has; 0.25 is used" in out
    kept = json.loads((second / "log_settings.json").read_text())
    assert (kept["arch"], kept["size"], kept["channels"], kept["mean"], kept["std"]) == (
        "test_resnet",
        16,
        1,
        [0.3],
        [0.25],
    )
    assert kept["pretrained"] == str(path)
    said = "\n".join(describe_file(str(second / path.name)))
    assert f"--pretrained {path}" in said
    assert open_backbone(str(second / path.name)).channels == 1


def test_another_architecture_is_the_probes_sentence(saved):
    with pytest.raises(
        UserError, match="does not fit the encoder: it lacks .*; the file was trained with -a test_resnet"
    ):
        begun(saved, "-a", "resnet18")


def test_a_resumed_run_goes_on_from_its_own(tmp_path, image_folder, pretrained, in_process, capsys):
    few = ["-b", 8, "--moco-k", 20, "-j", 0, "--knn-every", 0, "--amp", "off", "--seed", 0, "--size", 16]
    words = [*few, "--save-dir", tmp_path / "run", "--resume", "auto", image_folder]
    (copy := tmp_path / "start.pth.tar").write_bytes(pretrained.read_bytes())
    assert in_process(*words, "--pretrained", copy, "--steps", 1) == 0
    assert "is not read" not in capsys.readouterr().out
    copy.unlink()  # which nothing reads any more
    assert in_process(*words, "--pretrained", copy, "--steps", 2) == 0
    out = capsys.readouterr().out
    first = tmp_path / "run" / "checkpoint_0000_step_00000001.pth.tar"
    assert f"--pretrained {copy} is not read: the run goes on from {first}\n" in out
    assert "--pretrained none" not in out
    assert in_process(*words, "--steps", 3) == 0  # its architecture too is the checkpoint's
    assert "resumed with --steps 3 (was 2)\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "log_settings.json").read_text())["pretrained"] == str(copy)
    flags = torch.load(tmp_path / "run" / "checkpoint_0000.pth.tar", weights_only=True)["run"]["flags"]
    assert flags["--pretrained"] == str(copy)


def test_the_rates_are_those_without(tmp_path, image_folder, pretrained, in_process):
    words = [*TINY, "--epochs", 2, "--schedule", 1, "--moco-dim", 24, "-p", 3]
    rates = {}
    for name, more in (("with", ["--pretrained", pretrained]), ("without", [])):
        assert in_process(*words, *more, "--save-dir", tmp_path / name, image_folder) == 0
        rows = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        rates[name] = [(row["step"], row["lr"]) for row in rows if "lr" in row]
    assert rates["with"] == rates["without"]
    assert len({lr for _, lr in rates["with"]}) == 2


def hold_what_the_file_has(args):
    """A worker that builds its model and compares it with the other process's and with the file."""
    args, sources = open_images(args, None, {}, image_options)
    config = pretrain_config(args)
    view = view_settings(config.views, sources.pretrain)
    torch.manual_seed(distributed.rank())  # what is drawn differs, what is read does not
    model, _ = build_model(config, view, 0, len(sources.pretrain), 4)
    entries = torch.load(args.pretrained, weights_only=True)["state_dict"]
    for encoder in encoders_of(model):
        for name, value in encoder.state_dict().items():
            assert distributed.same_on_all_ranks(value), name
            assert torch.equal(value, entries[f"module.encoder_q.{name}"]), name
    print("alike", flush=True)


def test_two_processes_begin_alike(image_folder, start, saved):
    program = start(
        "--moco-dim", 16, "-b", 8, "--nproc", 2, "--pretrained", saved, image_folder, main=hold_what_the_file_has
    )
    assert program.end() == 0, program.text
    assert program.text.count("alike") == 2
