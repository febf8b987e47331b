"""What moco.export --to hub writes is loaded by timm alone, computes the same, and its card says only what is known."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import TINY, load
from PIL import Image
from support.layouts import OwnResNet, by_position, lightly
from torch import nn

import main_lincls
import main_pretrain
from moco import cli, run_folder
from moco import export as export_door
from moco.cli.commands import parse_embed
from moco.data.augment.by_pil import eval_view
from moco.eval import embed
from moco.models.encoder import build_encoder, features
from moco.models.inputs import normalise
from moco.weights import card, export
from moco.weights.read import open_backbone

pytestmark = pytest.mark.usefixtures("restored")
REST = TINY[4:]  # without -a and --size


@pytest.fixture(scope="module")
def runs(image_folder, tmp_path_factory):
    """A function from a run's flags to its checkpoint."""
    torch.set_num_threads(1)
    found = {}

    def run(flags: str) -> Path:
        if flags not in found:
            folder = tmp_path_factory.mktemp("run")
            words = [str(image_folder), *REST, "--knn-every", "1", "--knn-k", "5", "9", "--epochs", "1", "--lr", "1e-3"]
            words += ["--save-dir", str(folder), *flags.split()]
            assert main_pretrain.worker(cli.parse_pretrain(words)) == 0
            found[flags] = next(iter(folder.glob("checkpoint_*")))
        return found[flags]

    return run


RESNET = "-a resnet18 --size 32 --stem imagenet --mlp --method synco --n-hard 8 --n1 4 --hard-start-epoch 0"
GREY = "-a test_resnet --size 28 --channels 1 --mean 0.2 --std 0.4"
VIT = "-a test_vit --size 64 --mean 0.1 0.2 0.3 --std 0.3 0.2 0.4"


def exported(path: Path, *words: str) -> Path:
    assert export_door.main([str(path), "--to", "hub", *words]) == 0
    return path.parent / (path.name.removesuffix(".pth.tar") + ".hub")


def by_overlay(folder: Path) -> nn.Module:
    """As with a timm before 1.0.26, whose local-dir knows no safetensors."""
    config = json.loads((folder / "config.json").read_text())
    overlay = {**config["pretrained_cfg"], "file": str(folder / "model.safetensors")}
    return timm.create_model(
        config["architecture"], pretrained=True, pretrained_cfg_overlay=overlay, **config["model_args"]
    ).eval()


@pytest.mark.parametrize("flags", [RESNET, GREY, VIT], ids=["resnet", "grey", "vit"])
def test_timm_loads_the_folder_and_computes_the_same(runs, tmp_path, flags):
    source = open_backbone(str(runs(flags)))
    folder = exported(runs(flags))
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    arguments = {RESNET: {}, GREY: {"in_chans": 1}, VIT: {"img_size": 64}}[flags]
    assert json.loads((folder / "config.json").read_text())["model_args"] == arguments
    images = torch.randn(2, source.channels, source.size, source.size)
    for network in (timm.create_model(f"local-dir:{folder}", pretrained=True).eval(), by_overlay(folder)):
        with torch.no_grad():
            assert torch.equal(network(images), features(source.encoder, images))
        found = timm.data.resolve_model_data_config(network)
        run = load(runs(flags).parent)["run"]["images"]
        assert (list(found["mean"]), list(found["std"])) == (run["mean"], run["std"])
        assert list(found["input_size"]) == [run["channels"], run["size"], run["size"]]
        pixels = np.random.default_rng(0).integers(0, 256, (70, 70, 3), np.uint8)
        image = Image.fromarray(pixels).convert("L" if source.channels == 1 else "RGB")
        ours = normalise(eval_view(image, source.size)[None], run["mean"], run["std"])[0]
        torch.testing.assert_close(timm.data.create_transform(**found)(image), ours, rtol=0, atol=1e-5)


def test_a_new_classifier_goes_on_the_features(runs):
    network = timm.create_model(f"local-dir:{exported(runs(VIT))}", pretrained=True, num_classes=3).eval()
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    assert torch.equal(network.cls_token, open_backbone(str(runs(VIT))).encoder.cls_token)


def test_attention_heads_that_no_tensor_tells_are_arguments(tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", num_heads=12, img_size=32, num_classes=0).eval()
    with torch.no_grad():
        network.pos_embed[0, 0] = 0
    entries = {f"module.base_encoder.{name}": value for name, value in network.state_dict().items()}
    torch.save({"epoch": 300, "arch": "vit_tiny", "state_dict": entries}, tmp_path / "v3.pth.tar")
    folder = exported(tmp_path / "v3.pth.tar")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(x), network(x))
    assert "pretrained by a method that its checkpoint does not name" in (folder / "README.md").read_text()


def test_the_blocks_of_the_card_run(runs, tmp_path, monkeypatch):
    folder = exported(runs(GREY))
    shutil.copytree(folder, tmp_path / folder.name)  # as a clone of it has it
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)).save("image.jpg")
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", Path(folder.name, "README.md").read_text(), flags=re.S)
    for block in blocks:
        exec(block, names)
    with Image.open("image.jpg") as image:
        pixels = eval_view(image.convert("L"), 28)[None]
    source = open_backbone(str(runs(GREY)))
    with torch.no_grad():
        expected = features(source.encoder, normalise(pixels, [0.2], [0.4]))
        torch.testing.assert_close(names["features"], expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(names["model"](pixels.float()), features(source.encoder, pixels.float()))  # the second's
    assert len(blocks) == 2


def test_a_kept_classifier_has_its_classes(runs, image_folder, tmp_path):
    words = [str(image_folder), "-b", "8", "-j", "0", "--epochs", "1", "--features", "cached", "--lr", "1"]
    words += ["--pretrained", str(runs(VIT)), "--save-dir", str(tmp_path)]
    assert main_lincls.worker(cli.parse_lincls(words)) == 0
    folder = exported(tmp_path / "checkpoint.pth.tar", "--head", "keep")
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    state = load(tmp_path / "checkpoint.pth.tar")
    x = torch.randn(2, 3, 64, 64)
    ours = build_encoder("test_vit", 2, size=64).eval()
    ours.load_state_dict({name.removeprefix("module."): value for name, value in state["state_dict"].items()})
    with torch.no_grad():
        assert torch.equal(network(x), ours(x))
    assert (network.num_classes, list(network.pretrained_cfg["label_names"])) == (2, ["blue", "red"])
    text = (folder / "README.md").read_text()
    assert "pipeline_tag: image-classification" in text and "with a classifier of 2 outputs, pretrained by moco" in text
    assert f"| linear probe, the best of its epochs | {state['best_acc1']:.2f} | lr 1, epochs 1 |" in text
    assert export_door.main([str(folder), "--to", "features", "--out", str(tmp_path / "f.pt")]) == 0  # of the export
    again = json.loads((tmp_path / "f.json").read_text())
    assert again["measured"][0]["top1"] == state["best_acc1"]
    assert again["command"].startswith("moco pretrain ")


# ------------------------------------------------------------------------------------------------- what it says


def test_the_training_command_gives_the_recorded_flags(runs):
    folder = exported(runs(RESNET))
    made = load(runs(RESNET).parent)["run"]["pretraining"]
    command = re.search(r"```bash\n(.*?)\n```", (folder / "README.md").read_text())
    assert command
    moco, pretrain, *words = shlex.split(command[1])
    assert (moco, pretrain, words[-1]) == ("moco", "pretrain", "DIR")
    args = cli.parse_pretrain(words)
    from moco.cli.flag_classes import dests
    from moco.cli.pretrain import pretrain_parser

    given = {name: getattr(args, dest, None) for name, dest in dests(pretrain_parser()).items()}
    assert {name: given[name] for name in made["recipe"]} == made["recipe"]
    assert (args.arch, args.size, args.stem, args.method) == ("resnet18", 32, "imagenet", "synco")


def test_the_card_says_what_was_measured_and_nothing_else(runs, image_folder, tmp_path):
    for path in runs(GREY).parent.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    path = tmp_path / runs(GREY).name
    (logged,) = [record for line in (tmp_path / "log.jsonl").read_text().splitlines()
                 if "knn" in (record := json.loads(line))]  # fmt: skip
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write(json.dumps({**logged, "step": logged["step"] + 1, "knn": 1.0}) + "\n")  # of a later checkpoint
    by_log = {"measure": "k-NN", "top1": logged["knn"], "k": 5, "T": 0.1, "by": "log.jsonl"}
    assert card.measured(open_backbone(str(path)).file) == [by_log]
    words = [str(image_folder), "-b", "8", "-j", "0", "--pretrained", str(path), "--save-dir", str(tmp_path / "probe")]
    assert main_lincls.worker(cli.parse_lincls([*words, "--knn", "--knn-k", "7", "--knn-t", "0.2"])) == 0
    assert main_lincls.worker(cli.parse_lincls([*words, "--features", "cached", "--lr", "3", "--epochs", "2"])) == 0
    for name, other in (("other", "elsewhere/" + path.name), ("none", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "knn.json").write_text(json.dumps({"mode": "knn", "knn": 99.0, "pretrained": other}))
    knn, probe = (json.loads((tmp_path / "probe" / name).read_text()) for name in ("knn.json", "result.json"))
    found = card.measured(open_backbone(str(path)).file)
    counts = {"train_images": 24, "val_images": 8}
    assert found == [
        by_log,
        {"measure": "k-NN", "top1": knn["knn"], "k": 7, "T": 0.2, **counts, "by": "probe/knn.json"},
        {"measure": "linear probe", "top1": probe["acc1"], "lr": 3.0, "epochs": 2, "features": "cached", **counts,
         "by": "probe/result.json"},
    ]  # fmt: skip
    text = (exported(path) / "README.md").read_text()
    assert f"| k-NN | {knn['knn']:.2f} | k 7, T 0.2, train images 24, val images 8 | `probe/knn.json` |" in text
    later = os.path.getmtime(tmp_path / "probe" / "knn.json") + 10
    os.utime(path, (later, later))  # a checkpoint that was written since: what was measured was another
    assert card.measured(open_backbone(str(path)).file) == [by_log]
    (tmp_path / "log_settings.json").unlink()  # without k and T it is no figure
    assert card.measured(open_backbone(str(path)).file) == []
    assert "Nothing: no accuracy is written" in (exported(path) / "README.md").read_text()


def test_names_from_outside_break_neither_yaml_nor_markdown(runs, tmp_path):
    state = load(runs(GREY).parent)
    name = "x\n---\n# title\n```\n|a|\x1b[2J`<script>"
    state["run"]["pretraining"]["data"]["name"] = name
    state["run"]["pretraining"]["torch"] = "2\n---\n[x](http://y)\x1b"
    state["run"]["pretraining"]["recipe"]["--aug"] = "v2\n```\nrm -rf /"
    path = tmp_path / "a\n# b`|\"'c.pth.tar"
    torch.save(state, path)
    text = (exported(path) / "README.md").read_text()
    assert "\x1b" not in text
    _, head, body = re.split(r"^---$", text, flags=re.M)
    assert yaml.safe_load(head) == {
        "library_name": "timm", "pipeline_tag": "image-feature-extraction",
        "tags": ["timm", "self-supervised", "contrastive-learning", "moco"],
    }  # fmt: skip
    assert [line for line in body.splitlines() if line.startswith("# ")] == ["# a \\# b\\`\\|\"'c.hub"]
    assert body.count("\n```") == 6  # three blocks
    for block in re.findall(r"```python\n(.*?)```", body, flags=re.S):
        compile(block, "card", "exec")
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in body.splitlines() if line.startswith("| images"))
    assert "\\[x\\](http://y)" in body and "[x](http" not in body.replace("\\[x\\](", "")
    assert "'v2 ``` rm -rf /'" in body


# ------------------------------------------------------------------------------------------- back into our programs


KINDS = {"torchvision": RESNET, "timm": GREY, "hub": GREY, "safetensors": VIT, "features": GREY}


@pytest.mark.parametrize(("to", "flags"), KINDS.items(), ids=KINDS)
def test_every_kind_is_read_back_without_a_flag(runs, image_folder, tmp_path, to, flags):
    path, out = runs(flags), str(tmp_path / "x") + export.SUFFIXES[to]
    assert export_door.main([str(path), "--to", to, "--out", out]) == 0
    found = []
    for file in (str(path), out):
        words = [file, str(image_folder), "-j", "0", "--split", "val"]
        read = embed.read_features(parse_embed(words))
        found.append((read.share.x, read.source.channels))
        probe = [str(image_folder), "-b", "8", "-j", "0", "--pretrained", file, "--knn", "--seed", "0"]
        assert main_lincls.worker(cli.parse_lincls([*probe, "--save-dir", str(tmp_path / f"knn{len(found)}")])) == 0
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    assert found[0][1] == found[1][1]
    results = [json.loads((tmp_path / f"knn{i}" / "knn.json").read_text()) for i in (1, 2)]
    one, other = ({**result, "pretrained": "", "arch": ""} for result in results)
    assert one == other
    assert open_backbone(run_folder.encoder_file(out)).pretraining == load(path.parent)["run"]["pretraining"]


# --------------------------------------------------------------------------------------------------- refusals


def refused(capsys, *words: object) -> str:
    assert export_door.main([*map(str, words), "--to", "hub"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_what_timm_cannot_build_is_one_sentence(tmp_path, capsys):
    torch.save(build_encoder("resnet18", 8, size=32).state_dict(), tmp_path / "small.pth")
    said = refused(capsys, tmp_path / "small.pth")
    assert "a 3x3 first convolution and no max-pool, which timm.create_model cannot build: take --to timm" in said
    torch.save(lightly(lambda: by_position(OwnResNet(7)))[0], tmp_path / "bare.ckpt")
    assert "neither ReLU nor max-pool after bn1" in refused(capsys, tmp_path / "bare.ckpt")
    assert list(tmp_path.glob("*.hub")) == []


def test_a_folder_of_something_else_stays(runs, tmp_path, capsys, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    assert "holds something else" in refused(capsys, runs(GREY), "--out", tmp_path / "full")
    assert "is a file" in refused(capsys, runs(GREY), "--out", tmp_path / "file")
    folder = tmp_path / "mine"
    assert export_door.main([str(runs(GREY)), "--to", "hub", "--out", str(folder)]) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert "cannot be written" in refused(capsys, runs(VIT), "--out", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert export_door.main([str(runs(VIT)), "--to", "hub", "--out", str(folder)]) == 0  # an earlier export is replaced
    assert open_backbone(str(folder / "model.safetensors")).arch == "timm/test_vit"
