"""The linear probe: the protocol's rules, one process against two, resume, and each mistake's sentence."""

import csv
import json
import math
import os
import shutil
import signal
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from conftest import differences, records, rounding, run, spoiled, wait_until
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from support.probing import ARCH, TINY, probe_once, state_of
from torch import nn

import main_lincls
from moco import files, signals
from moco.cli import parse_lincls
from moco.config import OptimizerConfig, ScheduleConfig
from moco.data import ArraySource, EpochSampler, FileSource, Labelled, Sources, make_loader
from moco.errors import TrainingError, UserError
from moco.eval import details, linear, linear_fit, linear_report, lr_find
from moco.eval import features as features_of_images
from moco.eval.classifier import Classifier, backbone_of, check_frozen
from moco.eval.features import (
    EvalData,
    Features,
    LabelledBatches,
    TooManyUnreadError,
    bad_image_notes,
    check_unread,
    most_unreadable,
)
from moco.models.encoder import build_encoder
from moco.train.plan import Progress, count_epochs
from moco.train.runlog import RunLog

pytestmark = pytest.mark.usefixtures("restored")
CPU = torch.device("cpu")


def one_head(model: Classifier, lr: float = 0.3) -> linear.LinearClassifier:
    return linear.make_classifiers(model, [lr], OptimizerConfig())[0]


def table_of(path) -> list[dict]:
    return list(csv.DictReader(path.read_text().splitlines()))


def make_probe() -> Classifier:
    torch.manual_seed(0)
    return Classifier(build_encoder("resnet18", 10, size=16), (0.5,) * 3, (0.2,) * 3, seed=0, freeze=True)


# ---------------------------------------------------------------------------------------------------- the protocol


def test_defaults_are_upstreams():
    args = parse_lincls(["DIR"])
    assert (args.lr, args.schedule, args.epochs, args.batch_size) == (30.0, [60, 80], 100, 256)
    assert (args.momentum, args.weight_decay, args.amp, args.features) == (0.9, 0.0, "off", "views")


def test_head_starts_as_published_and_nothing_else_is_trained():
    model = make_probe()
    weight, bias = model.encoder.fc.weight, model.encoder.fc.bias
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [p is q for p, q in zip(trained, (weight, bias), strict=True)] == [True, True]
    assert abs(float(weight.detach().std()) - 0.01) < 3e-4
    assert abs(float(weight.detach().mean())) < 5e-4
    assert not bias.any()
    assert not any(module.training for module in model.encoder.modules())


def test_same_numbers_and_gradients_as_upstreams_forward_through_the_whole_network():
    model = make_probe()
    images, labels = torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8), torch.arange(6)
    ours = one_head(model).logits(model.features(images))
    nn.functional.cross_entropy(ours, labels).backward()
    gradients = [p.grad.clone() for p in model.head]
    for p in model.head:
        p.grad = None
    theirs = model.encoder((images.float() / 255 - 0.5) / 0.2)
    nn.functional.cross_entropy(theirs, labels).backward()
    torch.testing.assert_close(ours, theirs)
    for mine, p in zip(gradients, model.head, strict=True):
        torch.testing.assert_close(mine, p.grad)


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "dpn68", "mobilenet_v3_small"])
def test_heads_of_other_families_are_probed(arch):
    """A timm network, one whose classifier is a 1x1 convolution, and one with dropout before its last layer."""
    torch.manual_seed(0)
    model = Classifier(build_encoder(arch, 4, size=32), (0.5,) * 3, (0.2,) * 3, seed=0, freeze=True)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        whole = model.encoder((images.float() / 255 - 0.5) / 0.2)
    torch.testing.assert_close(one_head(model).logits(model.features(images)), whole)


def test_separable_images_reach_all_right(image_folder, tmp_path, capsys):
    found = probe_once(image_folder, tmp_path, "--epochs", 3, "--schedule", 2)
    assert found["acc1"] == found["best_acc1"] == 100.0
    assert (found["classes"], found["train_images"], found["val_images"], found["epochs"]) == (2, 24, 8, 3)
    output = capsys.readouterr().out.splitlines()
    assert "a baseline" in output[0]
    assert output[-3] == " * Acc@1 100.000 (best Acc@1 100.000)"
    lines = records(tmp_path / "lincls.jsonl")
    assert [r["step"] for r in lines if "val_acc1" in r] == [3, 6, 9]
    assert [r["epoch"] for r in lines] == [(r["step"] - 1) // 3 for r in lines]
    rates = {r["step"]: r["lr"] for r in lines if "lr" in r}
    assert rates == pytest.approx({2: 0.3, 3: 0.3, 5: 0.3, 6: 0.3, 8: 0.03, 9: 0.03})


def test_every_frozen_tensor_stays_the_files(hard_folder, pretrained, tmp_path):
    found = probe_once(hard_folder, tmp_path, "--pretrained", pretrained, "--epochs", 2)
    file = torch.load(pretrained, weights_only=True)["state_dict"]
    state = state_of(tmp_path)
    assert set(state) == {"epoch", "arch", "state_dict", "best_acc1", "optimizer", "run"}
    assert (state["epoch"], state["arch"]) == (2, ARCH)
    assert all(name.startswith("module.") for name in state["state_dict"])
    plain = {name.removeprefix("module."): value for name, value in state["state_dict"].items()}
    for name, value in plain.items():
        if not name.startswith("fc."):
            assert torch.equal(value, file["module.encoder_q." + name]), name
    assert state_of(tmp_path, "model_best.pth.tar")["best_acc1"] == found["best_acc1"]
    assert found["pretrained"] == str(pretrained)


def test_the_checkpoint_is_a_torchvision_network(image_folder, tmp_path):
    probe_once(image_folder, tmp_path, "--epochs", 1, "-a", "resnet18", "--stem", "imagenet")
    entries = {name.removeprefix("module."): value for name, value in state_of(tmp_path)["state_dict"].items()}
    torchvision.models.resnet18(num_classes=2).load_state_dict(entries)  # strict
    assert entries["fc.weight"].std() > 0.011  # trained


@pytest.mark.parametrize("name", ["bn1.running_mean", "layer1.0.conv1.weight", "bn1.num_batches_tracked"])
def test_a_tensor_that_moved_is_noticed(name):
    model = make_probe()
    asked = (model.encoder, backbone_of(model.encoder), "must stay frozen", "the file")
    check_frozen(*asked)
    model.encoder.state_dict()[name].view(-1)[0] += 1
    with pytest.raises(TrainingError, match=f"1 tensors .* the file, the first {name}"):
        check_frozen(*asked)


def test_an_encoder_in_train_mode_ends_the_run_after_an_epoch(hard_folder, pretrained, tmp_path, monkeypatch):
    features = Classifier.features

    def in_train_mode(self, images):
        self.encoder.train()
        return features(self, images)

    monkeypatch.setattr(Classifier, "features", in_train_mode)
    with pytest.raises(TrainingError, match="must stay frozen"):
        probe_once(hard_folder, tmp_path, "--pretrained", pretrained, "--epochs", 2)
    assert not (tmp_path / "checkpoint.pth.tar").exists()


# ------------------------------------------------------------------------------------------ modes that go on or ask


def test_resumed_equals_uninterrupted(hard_folder, pretrained, tmp_path):
    words = ("--pretrained", pretrained, "--schedule", 1, 2)
    whole = probe_once(hard_folder, tmp_path / "whole", *words, "--epochs", 3)
    probe_once(hard_folder, tmp_path / "parts", *words, "--epochs", 2)
    parts = probe_once(hard_folder, tmp_path / "parts", *words, "--epochs", 3, "--resume", "auto")
    assert whole == parts
    one, two = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    assert one["best_acc1"] == two["best_acc1"]
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name
    momenta = [state["optimizer"]["state"] for state in (one, two)]
    for index in momenta[0]:
        assert torch.equal(momenta[0][index]["momentum_buffer"], momenta[1][index]["momentum_buffer"])
    steps = [
        [json.loads(line)["step"] for line in (tmp_path / run / "lincls.jsonl").read_text().splitlines()]
        for run in ("whole", "parts")
    ]
    assert steps[0] == steps[1]


@pytest.mark.parametrize("words", [["--lr", 0.3, 0.1], ["--features", "cached", "--save-ckpt-freq", 1]])
def test_resumed_after_every_step_is_the_same_run(words, hard_folder, tmp_path):
    words = [*words, "--epochs", 2, "--opt", "adamw", "--warm", "--warm-epochs", 1, "-p", 100]
    whole = probe_once(hard_folder, tmp_path / "whole", *words)
    args = [*map(str, [hard_folder, *TINY, *words, "--save-dir", tmp_path / "parts", "--resume", "auto"])]
    for step in range(6):  # two epochs of three steps
        assert main_lincls.worker(parse_lincls([*args, "--max-minutes", "0"])) == 75
        assert not (tmp_path / "parts" / "result.json").exists()
        position = state_of(tmp_path / "parts")
        assert (position["epoch"], position["run"]["batch"]) == ((0, step + 1) if step < 3 else (1, step - 2))
    assert probe_once(hard_folder, tmp_path / "parts", *words, "--resume", "auto") == whole
    names = [path.name for path in sorted((tmp_path / "whole").glob("*.tar"))]
    assert len(names) == (4 if "cached" in words else 2)
    for name in names:
        assert differences(state_of(tmp_path / "whole", name), state_of(tmp_path / "parts", name)) == [], name
    curves = [[r for r in records(tmp_path / run) if any("val_acc1" in key for key in r)] for run in ("whole", "parts")]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 2


def test_a_probe_inside_an_epoch_goes_on_with_its_batches_only(hard_folder, tmp_path):
    args = parse_lincls([*map(str, [hard_folder, *TINY, "--save-dir", tmp_path, "--max-minutes", 0])])
    assert main_lincls.worker(args) == 75
    told = sentence(hard_folder, tmp_path, "--resume", "auto", "-b", 12)
    assert "inside epoch 0 with 24 images, 8 images a batch; this run has 24 images, 12 images a batch" in told
    again = probe_once(hard_folder, tmp_path, "--resume", tmp_path / "checkpoint.pth.tar", "-e", "-b", 12)
    assert again["epochs"] == 0


def run_all(commands, args) -> int:
    """The program several times in the processes of one launch."""
    return max(main_lincls.worker(parse_lincls(words)) for words in commands)


@pytest.mark.dist
def test_signals_save_the_step_and_two_processes_go_on_inside_an_epoch(hard_folder, tmp_path, start):
    words = [*map(str, [hard_folder, *TINY, "--epochs", 1, "--lr", 0.3, 0.1, "--features", "cached"])]
    parts = [*words, "--save-dir", str(tmp_path / "parts"), "--resume", "auto"]
    commands = [[*words, "--save-dir", str(tmp_path / "whole")], *[[*parts, "--max-minutes", "0"]] * 2, parts]
    endless = [*words, "--epochs", "1000000", "-p", "1", "--save-dir", str(tmp_path / "endless")]
    program = start("--nproc", 2, "DIR", main=partial(run_all, [*commands, endless]))
    program.wait_for("Epoch: [1]")
    program.process.terminate()
    assert program.end() == 143, program.text
    assert "Traceback" not in program.text
    assert differences(*(state_of(tmp_path / name) for name in ("whole", "parts"))) == []
    assert "stopped after 2 of 3 steps of epoch 0 by --max-minutes; continue with " in program.text
    state = state_of(tmp_path / "endless")
    assert state["epoch"] > 0
    assert f"of epoch {state['epoch']} by SIGTERM: Acc@1 " in program.text.splitlines()[-1]


def test_sigusr1_ends_a_probe_with_a_checkpoint_and_exit_code_75(hard_folder, tmp_path, monkeypatch):
    stepped, step = [], linear.LinearClassifier.step

    def signalled(self, x, labels):
        stepped.append(1)
        if len(stepped) == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_until(signals.noted)
        return step(self, x, labels)

    monkeypatch.setattr(linear.LinearClassifier, "step", signalled)
    with signals.listening():
        assert main_lincls.worker(parse_lincls([str(hard_folder), *TINY, "--save-dir", str(tmp_path)])) == 75
    assert (len(stepped), state_of(tmp_path)["run"]["batch"]) == (2, 2)


def test_another_runs_folder_is_left_alone(hard_folder, tmp_path):
    words = ["--epochs", 2, "--save-ckpt-freq", 2]
    found = probe_once(hard_folder, tmp_path, *words)
    names = sorted(path.name for path in tmp_path.glob("*.tar"))
    before, log = [state_of(tmp_path, name) for name in names], records(tmp_path / "lincls.jsonl")
    other = ["--epochs", 1, "--lr", 1e-3, "--seed", 4]
    told = sentence(hard_folder, tmp_path, *other)
    assert "already holds checkpoint.pth.tar of another run; continue it with --resume auto, choose" in told
    probe_once(hard_folder, tmp_path, "-e", "--resume", "auto", "--knn-k", 3)
    probe_once(hard_folder, tmp_path, "--knn", "--knn-k", 3)
    probe_once(hard_folder, tmp_path, "--knn", "--knn-k", 4)  # a measure's own file is written anew
    assert json.loads((tmp_path / "result.json").read_text()) == found
    assert differences(before, [state_of(tmp_path, name) for name in names]) == []
    assert records(tmp_path / "lincls.jsonl") == log
    again = probe_once(hard_folder, tmp_path, *other, "--overwrite")
    assert (again["epochs"], again["lr"]) == (1, 1e-3)
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["checkpoint.pth.tar", "model_best.pth.tar"]
    (tmp_path / "checkpoint.pth.tar").unlink()  # as a fine-tuning leaves it
    assert "holds result.json of another run; choose another --save-dir" in sentence(hard_folder, tmp_path, *other)


def test_a_folder_of_an_older_probe_goes_on(hard_folder, tmp_path, capsys):
    probe_once(hard_folder, tmp_path, "--epochs", 1)
    path = tmp_path / "checkpoint.pth.tar"
    state = state_of(tmp_path)
    torch.save({**state, "run": {name: state["run"][name] for name in ("seed", "lr")}}, path)
    capsys.readouterr()
    assert probe_once(hard_folder, tmp_path, "--epochs", 2, "--resume", "auto")["epochs"] == 2
    first = capsys.readouterr().out.splitlines()[0]
    assert "after 1 epoch; the names of its classes are not in the file, they are taken to be" in first
    assert "baseline" not in first
    assert state_of(tmp_path)["run"]["classes"] == ["class0", "class1", "class2"]


@pytest.mark.parametrize("rates", [[0.3], [0.3, 0.1]])
def test_classes_are_found_by_name(rates, hard_folder, tmp_path, capsys):
    """A part of the classes, whose folders are numbered otherwise, is measured as in the whole."""
    trained = probe_once(hard_folder, tmp_path, "--epochs", 2, "--lr", *rates, "--per-class", tmp_path / "whole.csv")
    part = tmp_path / "part"
    for split in ("train", "val"):
        shutil.copytree(hard_folder / split, part / split, ignore=shutil.ignore_patterns("class0"))
    words = ["-e", "--resume", tmp_path / "checkpoint.pth.tar", "--per-class", tmp_path / "part.csv", "--confusion"]
    capsys.readouterr()
    found = probe_once(part, tmp_path / "out", *words)
    assert "classes numbered as in that file, by name (2 of its 3)" in capsys.readouterr().out.splitlines()[0]
    whole, rows = table_of(tmp_path / "whole.csv"), table_of(tmp_path / "part.csv")
    assert (rows[0]["class"], rows[0]["images"]) == ("class0", "0")
    same = next(row for row in found.get("per_lr", [found]) if row["lr"] == trained["lr"])
    assert same["acc1"] == pytest.approx(sum(float(row["top-1"]) for row in whole[1:]) / 2)
    assert 0 < same["acc1"] < 100
    assert rows[1:] == whole[1:] or found["lr"] != trained["lr"]
    assert "class0,0,0,0" in (tmp_path / "out" / "confusion.csv").read_text()
    go_on = ["--resume", tmp_path / "checkpoint.pth.tar", "--epochs", 3, "--lr", *rates]
    assert "lacks the class class0 of" in sentence(part, tmp_path / "out", *go_on)
    for split in ("train", "val"):
        (part / split / "class1").rename(part / split / "class9")
    assert "has the class class9, which the classifier in" in sentence(part, tmp_path / "out", *words)


def test_classes_in_another_order_are_the_same_classes(hard_folder, tmp_path, capsys):
    """As class folders the names 10, 9, 8 are in the order of text, in a list in that of numbers."""
    for split in ("train", "val"):
        for number, path in zip((10, 9, 8), sorted((hard_folder / split).iterdir()), strict=True):
            shutil.copytree(path, tmp_path / "folder" / split / str(number))
        lines = [f"{path}\t{path.parent.name}" for path in sorted((tmp_path / "folder" / split).rglob("*.png"))]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    words = ["--epochs", 6, "--features", "cached", "--lr", 0.1]
    found = probe_once(tmp_path / "folder", tmp_path / "run", *words)
    listed = [tmp_path / "train.txt", tmp_path / "out", "--val-data", tmp_path / "val.txt"]
    again = probe_once(*listed, "-e", "--resume", tmp_path / "run" / "checkpoint.pth.tar")
    assert again["acc1"] == found["acc1"]
    assert found["acc1"] > 40
    capsys.readouterr()
    words[1] = 7
    straight = probe_once(tmp_path / "folder", tmp_path / "straight", *words)
    mapped = probe_once(*listed, *words, "--resume", tmp_path / "run" / "checkpoint.pth.tar")
    assert "by name (3 of its 3)" in capsys.readouterr().out
    assert mapped["acc1"] == straight["acc1"]
    assert state_of(tmp_path / "out")["run"]["classes"] == ["10", "8", "9"]


def test_evaluation_repeats_the_accuracy_and_finds_the_encoder_in_the_checkpoint(
    hard_folder, pretrained, tmp_path, capsys
):
    trained = probe_once(hard_folder, tmp_path, "--pretrained", pretrained, "--epochs", 1)
    log = (tmp_path / "lincls.jsonl").read_text()
    again = probe_once(hard_folder, tmp_path, "--resume", tmp_path / "checkpoint.pth.tar", "-e")
    assert [again[x] for x in ("acc1", "acc5", "best_acc1")] == [trained[x] for x in ("acc1", "acc5", "best_acc1")]
    assert (tmp_path / "lincls.jsonl").read_text() == log
    first = [line for line in capsys.readouterr().out.splitlines() if line.startswith(ARCH)][-1]
    assert first == f"{ARCH} at 16 px: resumed {tmp_path / 'checkpoint.pth.tar'} after 1 epoch"


def test_neighbours_of_frozen_features(image_folder, pretrained, tmp_path, capsys):
    found = probe_once(image_folder, tmp_path, "--pretrained", pretrained, "--knn", "--knn-k", 5)
    assert (found["knn"], found["k"], found["T"]) == (100.0, 5, 0.1)
    assert capsys.readouterr().out.splitlines()[-1].startswith(" * k-NN 100.000 (k=5, T=0.1, cosine, encoder features")


def cached(x, labels, sampler) -> linear.CachedFeatures:
    found = Features(x, labels, torch.arange(len(x)), torch.ones(len(x), dtype=torch.bool))
    return linear.CachedFeatures(found, sampler, CPU)


def test_cached_features_are_those_of_whole_images(image_folder, tmp_path):
    found = probe_once(image_folder, tmp_path, "--epochs", 4, "--schedule", 3, "--features", "cached")
    assert found["acc1"] == 100.0
    model, source = make_probe(), ArraySource("grey", np.zeros((5, 16, 16, 3), np.uint8), labels=np.arange(5))
    data = linear.probe_data(model, EvalData(16, 2), source, training=True, cached=True)
    epochs = [torch.cat([labels for _, labels, _ in data.batches(e, linear.Stopwatch())]).tolist() for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [0, 1, 2, 3, 4]
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("features", ["views", "cached"])
def test_held_out_images_that_cannot_be_read_are_not_counted(features, hard_folder, tmp_path, capsys):
    damaged = spoiled(hard_folder, tmp_path / "damaged", 3)
    shutil.copytree(damaged, tmp_path / "without")
    for path in sorted((tmp_path / "without" / "val" / "class1").iterdir())[:3]:
        path.unlink()
    found = []
    for name in ("damaged", "without"):
        words = ["--features", features, "--epochs", 2, "--lr", 0.3, 0.1, "--per-class", tmp_path / f"{name}.csv"]
        found.append(probe_once(tmp_path / name, tmp_path / "runs" / name, *words))
        out = capsys.readouterr().out
        told = out.count("; 3 of 15 images cannot be read and are not counted")
        assert told == (2 if name == "damaged" else 0)  # after each epoch
    assert [x.pop("unreadable") for x in found] == [3, 0]
    losses = [[row.pop("val_loss") for row in x["per_lr"]] for x in found]
    assert losses[0] == pytest.approx(losses[1], rel=rounding(20 * 9 * 64))  # 20 layers, batches cut elsewhere
    assert found[0] == found[1]
    assert found[0]["val_images"] == 12
    assert (tmp_path / "damaged.csv").read_text() == (tmp_path / "without.csv").read_text()
    again = probe_once(damaged, tmp_path / "again", "-e", "--resume", tmp_path / "runs/damaged/checkpoint.pth.tar")
    assert (again["acc1"], again["unreadable"]) == (found[0]["acc1"], 3)


def test_no_held_out_image_that_can_be_read_is_one_sentence(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "images")
    for path in (tmp_path / "images" / "val").rglob("*.png"):
        path.write_bytes(b"no picture")
    for words in (["--features", "views"], ["--features", "cached"], ["--knn"]):
        told = sentence(tmp_path / "images", tmp_path / words[-1], *words, "--epochs", 1)
        assert "none of 8 images tried" in told
        assert not list(tmp_path.glob(f"{words[-1]}/*.json.*"))


def all_kinds(words, args) -> int:
    """The program's kinds of run, one after the other in the processes of one launch."""
    args = parse_lincls(words)
    main_lincls.worker(args)
    args.knn, args.per_class = True, None
    main_lincls.worker(args)
    args.knn = False
    args.lrs, args.save_dir = [1.0, 0.3], args.save_dir + "/several"
    main_lincls.worker(args)
    args.lr_find, args.lr_find_steps = True, 10
    return main_lincls.worker(args)


@pytest.mark.dist
def test_two_processes_equal_one(hard_folder, pretrained, tmp_path, start):
    hard_folder = spoiled(hard_folder, tmp_path / "images", 1)
    words = ["--pretrained", pretrained, "--epochs", 2, "--schedule", 1, "--knn-k", 5]
    probe_once(hard_folder, tmp_path / "one", *words, "--per-class", tmp_path / "one.csv")
    probe_once(hard_folder, tmp_path / "one", *words, "--knn")
    words += ["--per-class", tmp_path / "two.csv"]
    theirs = [*map(str, [*TINY, "--save-dir", tmp_path / "two", *words, hard_folder])]
    program = start("--nproc", 2, "DIR", main=partial(all_kinds, theirs))
    assert program.end() == 0, program.text
    for name, keys in (("result.json", ("acc1", "acc5", "best_acc1")), ("knn.json", ("knn",))):
        one, two = (json.loads((tmp_path / n / name).read_text()) for n in ("one", "two"))
        assert [one[k] for k in keys] == [two[k] for k in keys]
        assert 20 < one[keys[0]] < 100  # 15 held-out images: the last step is padded, and counted without the padding
        assert [(x["val_images"], x["unreadable"]) for x in (one, two)] == [(14, 1)] * 2
    one, two = (state_of(tmp_path / name)["state_dict"] for name in ("one", "two"))
    assert list(one) == list(two)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
    assert (tmp_path / "one.csv").read_text() == (tmp_path / "two.csv").read_text()
    same_as_alone(state_of(tmp_path / "two" / "several")["heads"][1], state_of(tmp_path / "two"))
    args = parse_lincls([*map(str, [hard_folder, *TINY, *words[:2], "--lr-find", "--lr-find-steps", 10])])
    args.save_dir = str(tmp_path / "one")
    main_lincls.worker(args)
    one, two = ([float(r["loss"]) for r in table_of(tmp_path / d / "lr_find.csv")] for d in ("one", "two/several"))
    assert one == pytest.approx(two, rel=1e-3)


def test_padding_is_not_counted():
    """Both ranks of two, played one after the other: every held-out image counts once."""
    source = ArraySource("five", np.zeros((5, 16, 16, 3), np.uint8), labels=np.zeros(5, np.int64))
    model = make_probe()
    nn.init.zeros_(model.encoder.fc.weight)
    with torch.no_grad():
        model.encoder.fc.bias[0] = 1.0  # always class 0, always right
    right = 0.0
    for rank in (0, 1):
        sampler = EpochSampler(5, 4, 0, 2, rank, drop_last=False, shuffle=False)
        images = linear.FreshFeatures(model, LabelledBatches(make_loader(Labelled(source, 16), sampler), sampler))
        head = one_head(model)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(linear.distributed, "world_size", lambda: 2)
            patch.setattr(linear.distributed, "rank", lambda rank=rank: rank)
            patch.setattr(linear.distributed, "sum_over_ranks", lambda values: values)
            linear.validate([head], images)
            assert head.score is not None
            right += head.score.acc1 * head.score.images / 5
    assert right == pytest.approx(100.0)


# ------------------------------------------------------------------------------------------------- several rates


def same_as_alone(entries: dict, state: dict) -> None:
    """One head of a file of several has every bit of a run with its rate alone."""
    alone = {
        "lr": state["run"]["lr"],
        "layer": {name: state["state_dict"][f"module.fc.{name}"] for name in ("weight", "bias")},
        "optimizer": state["optimizer"],
        "best_acc1": state["best_acc1"],
        "diverged": False,
    }
    assert differences({**entries, "layer": dict(entries["layer"])}, alone) == []


@pytest.mark.parametrize("features", ["views", "cached"])
def test_each_rate_equals_its_own_run_bit_for_bit(features, hard_folder, pretrained, tmp_path):
    words = ("--pretrained", pretrained, "--epochs", 3, "--schedule", 2, "--features", features)
    several = probe_once(hard_folder, tmp_path / "all", *words, "--lr", 0.3, 3, 0.01)
    heads = state_of(tmp_path / "all")["heads"]
    assert [entries["lr"] for entries in heads] == [0.3, 3.0, 0.01]
    for entries, row in zip(heads, several["per_lr"], strict=True):
        lr = f"{entries['lr']:g}"
        alone = probe_once(hard_folder, tmp_path / lr, *words, "--lr", lr)
        same_as_alone(entries, state_of(tmp_path / lr))
        assert {name: alone[name] for name in ("lr", "acc1", "acc5", "best_acc1")}.items() <= row.items()
        for record, whole in zip(records(tmp_path / lr), records(tmp_path / "all"), strict=True):
            mine = {name.split("/")[0]: value for name, value in whole.items() if name.endswith(f"/lr{lr}")}
            assert mine
            assert mine.items() <= record.items()


def test_the_best_rate_is_marked_and_the_selection_is_said(hard_folder, tmp_path, capsys):
    found = probe_once(hard_folder, tmp_path, "--epochs", 2, "--lr", 1e-6, 3, 0.3)
    rows = found["per_lr"]
    picked = next(row for row in rows if row["selected"])
    assert sum(row["selected"] for row in rows) == 1
    assert picked["acc1"] == max(row["acc1"] for row in rows)
    assert [found[name] for name in ("lr", "acc1", "acc5", "best_acc1")] == [
        picked[name] for name in ("lr", "acc1", "acc5", "best_acc1")
    ]
    assert found["selected_on"] == "validation"
    lines = capsys.readouterr().out.splitlines()
    end = max(number for number, line in enumerate(lines) if line.startswith(" * Acc@1"))
    warning, last = lines[end - 1 : end + 1]
    assert f"lr {picked['lr']:g} is picked among 3 by its accuracy on the held-out images" in warning
    assert last.startswith(f" * Acc@1 {picked['acc1']:.3f} (best Acc@1")
    assert f"lr {picked['lr']:g} {picked['acc1']:.3f}*" in last
    assert "lr 1e-06" in last


def test_several_rates_leave_files_that_a_reader_of_one_takes(hard_folder, tmp_path, capsys):
    found = probe_once(hard_folder, tmp_path, "--epochs", 3, "--lr", 3, 0.3, 0.003)
    best = state_of(tmp_path, "model_best.pth.tar")
    assert set(best) == {"epoch", "arch", "state_dict", "best_acc1", "optimizer", "run"}
    assert best["best_acc1"] == max(row["best_acc1"] for row in found["per_lr"])
    for state in (best, state_of(tmp_path)):
        entries = {name.removeprefix("module."): value for name, value in state["state_dict"].items()}
        build_encoder(ARCH, 3, size=16).load_state_dict(entries)  # strict
    last = state_of(tmp_path)
    leading = next(entries for entries in last["heads"] if entries["lr"] == found["lr"])
    assert torch.equal(last["state_dict"]["module.fc.weight"], leading["layer"]["weight"])
    alone = probe_once(hard_folder, tmp_path, "-e", "--resume", tmp_path / "model_best.pth.tar")
    assert alone["acc1"] == best["best_acc1"]
    again = probe_once(hard_folder, tmp_path, "-e", "--resume", tmp_path / "checkpoint.pth.tar")  # --lr is not typed
    assert again["per_lr"] == found["per_lr"]
    probe_once(hard_folder, tmp_path, "--knn", "--resume", tmp_path / "checkpoint.pth.tar")


def test_several_rates_resumed_equal_uninterrupted(hard_folder, pretrained, tmp_path):
    words = ("--pretrained", pretrained, "--schedule", 1, 2)
    whole = probe_once(hard_folder, tmp_path / "whole", *words, "--epochs", 3, "--lr", 3, 0.3, 1e38)
    probe_once(hard_folder, tmp_path / "parts", *words, "--epochs", 2, "--lr", 3, 0.3, 1e38)
    rest = ("--epochs", 3, "--resume", "auto", "--lr", 3, 0.3, 1e38)
    parts = probe_once(hard_folder, tmp_path / "parts", *words, *rest)
    assert whole == parts
    assert [entries["diverged"] for entries in state_of(tmp_path / "parts")["heads"]] == [False, False, True]
    for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        one, two = (state_of(tmp_path / run, name) for run in ("whole", "parts"))
        epochs = [state["run"]["flags"].pop("--epochs") for state in (one, two)]
        assert epochs == ([3, 3] if name == "checkpoint.pth.tar" else [3, 2])  # the best is of the first part
        broken = [state.get("heads", [{}] * 3).pop(2) for state in (one, two)]  # NaN equals nothing
        assert differences(one, two) == []
        assert broken[0].keys() == broken[1].keys()
    told = [[r for r in records(tmp_path / run) if "val_acc1/lr3" in r] for run in ("whole", "parts")]
    assert told[0] == told[1]
    assert len(told[0]) == 3


def test_a_rate_that_diverges_does_not_end_the_others(hard_folder, tmp_path, capsys):
    found = probe_once(hard_folder, tmp_path / "all", "--epochs", 2, "--lr", 1e38, 0.3)
    output = capsys.readouterr().out
    assert output.count("the loss of lr 1e+38 is") == 1
    assert "lr 1e+38 diverged, lr 0.3" in output.splitlines()[-3]
    probe_once(hard_folder, tmp_path / "alone", "--epochs", 2, "--lr", 0.3)
    same_as_alone(state_of(tmp_path / "all")["heads"][1], state_of(tmp_path / "alone"))
    lost = found["per_lr"][0]
    assert (lost["acc1"], lost["diverged"], lost["selected"], found["lr"]) == (None, True, False, 0.3)
    with pytest.raises(TrainingError, match="lower --lr"):
        probe_once(hard_folder, tmp_path / "none", "--epochs", 2, "--lr", 1e38, 2e38)


def test_resume_with_other_rates_is_refused(hard_folder, tmp_path):
    probe_once(hard_folder, tmp_path / "two", "--epochs", 1, "--lr", 3, 0.3)
    probe_once(hard_folder, tmp_path / "one", "--epochs", 1)
    two = ("--resume", tmp_path / "two" / "checkpoint.pth.tar")
    assert "was trained with --lr 3 0.3; resume it with" in sentence(hard_folder, tmp_path, *two, "--lr", 3, 0.1)
    assert "was trained with --lr 3 0.3; resume it with" in sentence(hard_folder, tmp_path, *two)
    one = ("--resume", tmp_path / "one" / "checkpoint.pth.tar")
    assert "holds one classifier" in sentence(hard_folder, tmp_path, *one, "--lr", 0.3, 3)
    state = files.read(str(two[1]))
    cut = {**state, "heads": [{"lr": entries["lr"]} for entries in state["heads"]]}
    files.write(cut, str(tmp_path / "cut.pth.tar"))
    damaged = ("--resume", tmp_path / "cut.pth.tar", "--lr", 3, 0.3)
    assert "is damaged: it lacks the entry heads[0].layer" in sentence(hard_folder, tmp_path, *damaged)
    swapped = probe_once(hard_folder, tmp_path / "two", "--epochs", 1, *two, "--lr", 0.3, 3)
    assert [row["lr"] for row in swapped["per_lr"]] == [0.3, 3.0]


def test_a_buffer_that_changes_in_the_second_epoch_ends_the_run(hard_folder, pretrained, tmp_path, monkeypatch):
    train_epoch = linear_fit.ProbeRun.train_epoch

    def tampering(run, data):
        train_epoch(run, data)
        if run.at.epoch == 1:
            data.probe.encoder.bn1.running_var[2] += 1e-3

    monkeypatch.setattr(linear_fit.ProbeRun, "train_epoch", tampering)
    with pytest.raises(TrainingError, match=r"1 tensors that must stay frozen .* bn1\.running_var"):
        probe_once(hard_folder, tmp_path, "--pretrained", pretrained, "--epochs", 4)
    assert state_of(tmp_path)["epoch"] == 1


# ---------------------------------------------------------------------------------------- what is told on request


def test_classes_and_confusion_are_counts_of_the_predictions(hard_folder, tmp_path):
    table, wanted = tmp_path / "tables" / "classes.csv", ("--confusion", "--lr", 0.3, 0.01)
    found = probe_once(hard_folder, tmp_path, "--epochs", 2, "--per-class", table, *wanted)
    matrix = list(csv.reader((tmp_path / "confusion.csv").read_text().splitlines()))
    names = ["class0", "class1", "class2"]
    assert matrix[0][1:] == [row[0] for row in matrix[1:]] == names
    counts = np.array([row[1:] for row in matrix[1:]], dtype=int)
    assert counts.sum(1).tolist() == [5, 5, 5]
    assert 100 * counts.trace() / 15 == found["acc1"]
    rows = table_of(table)
    assert [row["class"] for row in rows] == names
    for i, row in enumerate(rows):
        assert (row["images"], row["top-1"], row["top-5"]) == ("5", f"{100 * counts[i, i] / 5:.3f}", "")
        wrong = {name: count for name, count in zip(names, counts[i], strict=True) if name != names[i]}
        assert row["most confused with"] == (max(wrong, key=lambda n: wrong[n]) if any(wrong.values()) else "")
    with Image.open(tmp_path / "confusion.png") as picture:
        assert min(picture.size) > 300
    before = table.read_text()
    table.unlink()
    probe_once(hard_folder, tmp_path, "-e", "--resume", tmp_path / "checkpoint.pth.tar", "--per-class", table)
    assert table.read_text() == before


def test_top5_of_few_classes_is_not_told(hard_folder, tmp_path, capsys):
    found = probe_once(hard_folder, tmp_path, "--epochs", 1, "--lr", 0.3, 0.1)
    assert found["acc5"] is None
    assert found["per_lr"][0]["acc5"] is None
    assert found["not_measured"]["acc5"] == "100 % by definition: 3 classes"
    assert "Acc@5" not in capsys.readouterr().out
    assert not any("acc5" in key for record in records(tmp_path) for key in record)


def test_predictions_are_what_a_loop_finds(tmp_path):
    torch.manual_seed(0)
    x, labels = torch.randn(50, 9), torch.randint(0, 7, (50,))
    sampler = EpochSampler(50, 16, 0, drop_last=False, shuffle=False)
    head = linear.LinearClassifier(nn.Linear(9, 8), OptimizerConfig(lr=1.0))  # no image has class 7
    linear.validate([head], cached(x, labels, sampler), predictions=True)
    assert head.score is not None and head.score.predictions is not None
    order = [sorted(range(8), key=lambda c: -row[c]) for row in head.layer(x).tolist()]
    matrix, among5 = [[0] * 8 for _ in range(8)], [0] * 8
    for best, label in zip(order, labels.tolist(), strict=True):
        matrix[label][best[0]] += 1
        among5[label] += label in best[:5]
    assert head.score.predictions[:, 1].tolist() == [best[0] for best in order]
    assert head.score.acc1 == 100 * sum(matrix[c][c] for c in range(8)) / 50
    assert head.score.acc5 == 100 * sum(among5) / 50
    rows = details.class_rows(np.array(matrix), np.array(among5), list("abcdefgh"))
    assert rows[-1] == ["h", 0, "", "", ""]
    for c, row in enumerate(rows[1:8]):
        n = sum(matrix[c])
        assert row[1:4] == [n, f"{100 * matrix[c][c] / n:.3f}", f"{100 * among5[c] / n:.3f}"]
        assert matrix[c]["abcdefgh".index(row[4])] == max(matrix[c][:c] + matrix[c][c + 1 :])
    with RunLog(str(tmp_path), tensorboard=False) as log:
        counts, _ = linear_report.counts([head])
        details.Details([*"abcdefgh"], str(tmp_path / "c.csv"), None, log.line).write(counts, "it")
        blocked = tmp_path / "c.csv" / "below a file.csv"
        with pytest.raises(UserError, match=r"cannot be written .*choose another path"):
            details.Details([*"abcdefgh"], str(blocked), None, log.line).write(counts, "it")
    assert len((tmp_path / "c.csv").read_text().splitlines()) == 9


def test_label_smoothing_is_the_published_mixture():
    """Szegedy et al., arXiv 1512.00567, section 7: the target is (1 - e) of the label and e spread over all classes."""
    torch.manual_seed(0)
    x, labels, e = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 0, 1]), 0.2
    head = linear.LinearClassifier(nn.Linear(5, 4), OptimizerConfig(lr=0.1), smoothing=e)
    total = 0.0
    for row, label in zip(head.layer(x).detach().double(), labels.tolist(), strict=True):
        logs = [float(value) - math.log(sum(math.exp(v) for v in row.tolist())) for value in row]
        total -= sum(((1 - e) * (c == label) + e / 4) * log for c, log in enumerate(logs)) / 6
    sums = 5 + 4 + 6 + 4  # features, classes, images, the mixture
    assert float(head.step(x, labels)[0]) == pytest.approx(total, rel=rounding(sums))


def test_same_accuracy_as_a_peers_logistic_regression():
    """Real digits (8 x 8 pixels as features): within a point of scikit-learn's optimum of the same convex loss.

    Its C weighs the summed loss against |w|^2 / 2, so weight decay is 1 / (C n).
    """
    x, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    x = x / 16.0
    peer = LogisticRegression(C=1.0, max_iter=1000).fit(x[:1200], labels[:1200])
    rows, targets = torch.tensor(x, dtype=torch.float32), torch.tensor(labels)
    train = cached(rows[:1200], targets[:1200], EpochSampler(1200, 100, 0, drop_last=False))
    val = cached(rows[1200:], targets[1200:], EpochSampler(597, 100, 0, drop_last=False, shuffle=False))
    heads = [
        linear.LinearClassifier(nn.Linear(64, 10), OptimizerConfig(lr=lr, momentum=0.9, weight_decay=1 / 1200))
        for lr in (1.0, 0.3)
    ]
    plan = count_epochs(12, ScheduleConfig(60, milestones=(40, 50)))
    for epoch in range(60):
        linear.set_rates(heads, plan, Progress(0, epoch))
        for features, classes, _ in train.batches(epoch, linear.Stopwatch()):
            for head in heads:
                head.step(features, classes)
    linear.validate(heads, val)
    theirs = 100 * peer.score(x[1200:], labels[1200:])
    assert [head.score.acc1 for head in heads if head.score] == pytest.approx([theirs] * 2, abs=1.0)


# ------------------------------------------------------------------------------------------------- the range test


def test_the_range_test_suggests_a_rate_and_stops(image_folder, pretrained, tmp_path, capsys):
    args = [str(image_folder), *TINY, "--pretrained", str(pretrained), "--lr-find", "--lr-find-steps", "40"]
    assert main_lincls.worker(parse_lincls([*args, "--save-dir", str(tmp_path)])) == 0
    rows = table_of(tmp_path / "lr_find.csv")
    rates, losses, smoothed = ([float(row[name]) for row in rows] for name in ("lr", "loss", "smoothed"))
    assert rates == pytest.approx([1e-3 * 10 ** (6 * i / 39) for i in range(len(rows))])
    total, weight = 0.0, 0.0
    for i, (loss, mean) in enumerate(zip(losses, smoothed, strict=True)):
        weights = [0.9 ** (i - j) for j in range(i + 1)]
        total, weight = sum(w * v for w, v in zip(weights, losses, strict=False)), sum(weights)
        assert mean == pytest.approx(total / weight), loss
    result = json.loads((tmp_path / "lr_find.json").read_text())
    assert result["suggestion"] == float(f"{rates[smoothed.index(min(smoothed))]:.2g}")
    assert f"lr-find suggests --lr {result['suggestion']:g}" in capsys.readouterr().out.splitlines()[-1]
    with Image.open(tmp_path / "lr_find.png") as picture:
        assert min(picture.size) > 300
    assert not list(tmp_path.glob("*.tar"))
    found = probe_once(image_folder, tmp_path, "--pretrained", pretrained, "--epochs", 2, "--lr", result["suggestion"])
    assert found["acc1"] == 100.0


def test_the_range_test_takes_an_epoch_and_stops_where_no_higher_rate_can_do():
    torch.manual_seed(0)
    x, labels = torch.randn(130, 6), torch.randint(0, 3, (130,))
    for batch, steps in ((1, 130), (10, lr_find.MIN_STEPS)):
        data = cached(1e-4 * x, labels, EpochSampler(130, batch, 0, drop_last=False))
        head = linear.LinearClassifier(nn.Linear(6, 3), OptimizerConfig(lr=1.0, momentum=0.0, weight_decay=0.0))
        with torch.no_grad():
            head.layer.bias.zero_().requires_grad_(False)
        assert len(lr_find.sweep(head, data, None).rates) == steps  # features so small that no rate is too high
    head = linear.LinearClassifier(nn.Linear(6, 3), OptimizerConfig(lr=1.0))
    wild = lr_find.sweep(head, cached(100 * x, labels, data.sampler), None)
    assert len(wild.rates) < lr_find.MIN_STEPS
    assert wild.smoothed[-1] > 4 * min(wild.smoothed)
    with pytest.raises(TrainingError, match="not finite at the lowest rate"):
        lr_find.Sweep(100, [1e-3], [math.nan], [math.nan]).suggestion()


@pytest.mark.parametrize(
    ("losses", "wanted"),
    [
        ([2.0, 1.0, 2.0, 5.0], ["lowest smoothed loss, 1: suggested --lr 0.1", "rates that were not tried"]),
        ([2.0, 1.0, 2.0, 4.5], ["the loss is above 4 times its lowest at 1e+03"]),
        (
            [2.0, 1.5, 1.0, math.nan],
            ["the loss is not finite at 1e+03", "close to the last finite rate that was tried"],
        ),
        ([1.0, 2.0, 3.0, 3.5], ["close to the lowest rate that was tried"]),
        ([2.0, 2.0, 2.0, 2.0], ["close to the lowest rate that was tried"]),
    ],  # fmt: skip
    ids=["suggestion", "rising", "nan", "edge", "flat"],
)
def test_the_picture_of_a_range_test_marks_suggestion_edge_and_divergence(losses, wanted, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(lr_find, "write_figure", lambda figure, path: kept.append(figure))
    found = lr_find.Sweep(100, [1e-3, 0.1, 10.0, 1e3], losses, losses)
    lr_find.draw_sweep(found, "unused")
    (figure,) = kept
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(wanted) <= set(legend)
    assert any("suggested --lr" in text for text in legend)
    assert any("close to" in text for text in legend) == bool(found.edge())
    assert ("rates that were not tried" in legend) == (found.diverged_at is not None)
    (axis,) = figure.axes
    assert axis.get_title("left").replace("\n", " ") == (f"warning: {found.warning()}" if found.warning() else "")
    low, high = axis.get_ylim()
    assert low < found.lowest()[0] < high < 9
    figure.savefig(tmp_path / "drawn.png")


def test_a_suggestion_at_the_edge_is_told():
    rates = [1e-3, 1.0, 1e3]
    near = lr_find.Sweep(100, [1e-3, 1.9e-3, 2.1e-3, 490.0, 510.0, 1e3], [], [])
    for best, edge in enumerate(("lowest", "lowest", None, None, "highest", "highest")):
        near.losses = near.smoothed = [2.0 - (i == best) for i in range(6)]
        assert near.edge() == edge
    for losses, edge, words in (
        ([1.0, 2.0, 3.0], "lowest", "the loss rose from the lowest rates on"),
        ([3.0, 2.0, 1.0], "highest", "the loss was still falling at the highest rates tried"),
        ([2.0, 1.0, math.inf], "last finite", "the loss fell until it was not finite"),
        ([2.0, 1.0, 9.0], None, ""),
        ([2.0, 1.0, 3.0], None, ""),
    ):
        found = lr_find.Sweep(100, rates, losses, losses)
        assert (found.edge(), found.result()["edge"]) == (edge, edge)
        assert found.warning().startswith(words)
        assert (words in found.summary()) and ("warning" in found.summary()) == bool(words)
        assert found.result()["warning"] == found.warning()
        few = lr_find.Sweep(99, rates, losses, losses)
        assert found.result()["diverged_at"] == (1e3 if losses[-1] > 4 else None)
        assert "99 steps are too few" in few.warning()
        assert few.warning() in few.summary()


# --------------------------------------------------------------------------------------------------------- flags


def test_rates_are_typed_before_or_after_the_folder(tmp_path):
    for words in ("--lr 30 10 3 DIR", "DIR --lr 30 10 3", "--lr 30 10 3 -j 0 DIR", "--lr 1 --lr 30 10 3 DIR"):
        args = parse_lincls(words.split())
        assert (args.lrs, args.lr, args.data) == ([30.0, 10.0, 3.0], 30.0, "DIR")
    assert parse_lincls(["--lr", "0.5", "DIR"]).lrs == [0.5]
    file = tmp_path / "probe.yml"
    file.write_text("lr: [3, 0.3]\nlabel-smoothing: 0.1\n")
    assert parse_lincls(["--config", str(file), "DIR"]).lrs == [3.0, 0.3]
    assert parse_lincls(["--config", str(file), "--lr", "7", "DIR"]).lrs == [7.0]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("DIR --lr 30 0", "--lr must be a number above 0, not 0."),
        ("DIR --lr 30 nan 1", "--lr must be a number above 0"),
        ("DIR --lr 3 1 3", "the same rate twice"),
        ("DIR --lr fast", "--lr"),
        ("DIR --label-smoothing 1", "--label-smoothing is a share from 0 to below 1"),
        ("DIR --num-classes 0", "--num-classes must be at least 1"),
        ("DIR --train-folder OTHER", "DIR and --train-folder are the same thing"),
        ("--test-folder DIR", "give an image folder"),
        ("DIR --lr-find --lr-find-steps 3", "--lr-find-steps must be at least 10"),
        ("DIR --lr-find --knn", "--knn and --lr-find are two kinds of run"),
        ("DIR --max-minutes -1", "--max-minutes must be at least 0"),
        ("DIR --lr-find --resume auto", "--lr-find starts a new classifier"),
        ("DIR --few-shot --per-class x.csv", "which --few-shot does not record"),
        ("DIR --lr-find --confusion", "which --lr-find does not record"),
    ],
)
def test_mistakes_with_the_probes_flags(words, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_lincls(words.split())
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1)
    assert told in error


def test_own_data_by_its_two_folders(image_folder, tmp_path):
    usual = probe_once(image_folder, tmp_path, "--epochs", 1, "--num-classes", 2)
    for flag in ("--train-folder", "--data-folder"):
        words = [flag, image_folder / "train", "--test-folder", image_folder / "val", "--dataset", "path"]
        args = parse_lincls([*TINY, "--epochs", "1", "--overwrite", "--save-dir", str(tmp_path), *map(str, words)])
        assert main_lincls.worker(args) == 0
        assert json.loads((tmp_path / "result.json").read_text()) == usual
    assert "has 2 classes, not 10: correct --num-classes" in sentence(image_folder, tmp_path, "--num-classes", 10)


# ------------------------------------------------------------------------------------------------------- mistakes


def sentence(folder, tmp_path, *words) -> str:
    with pytest.raises(UserError) as caught:
        probe_once(folder, tmp_path, *words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_mistake_is_one_sentence_and_exit_code_2(image_folder, pretrained, tmp_path):
    words = [*TINY, "--save-dir", tmp_path, "--epochs", 1]
    done = run("main_lincls.py", *words, "-a", "resnet18", "--pretrained", pretrained, image_folder)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert "does not fit the encoder" in done.stderr
    assert "trained with -a test_resnet" in done.stderr


def test_mistakes_with_data_and_files(image_folder, pretrained, tmp_path):
    train_only = image_folder / "train"
    assert "held-out" in sentence(train_only, tmp_path)
    unlabelled = tmp_path / "flat"
    unlabelled.mkdir()
    shutil.copy(next(train_only.rglob("*.png")), unlabelled / "a.png")
    assert "probe needs labelled" in sentence(unlabelled, tmp_path, "--val-data", image_folder / "val")
    assert "no checkpoint at" in sentence(image_folder, tmp_path, "--pretrained", tmp_path / "none.pth.tar")
    assert "no checkpoint at" in sentence(image_folder, tmp_path, "--resume", tmp_path / "none.pth.tar")
    assert "--evaluate needs --resume" in sentence(image_folder, tmp_path, "--evaluate")
    assert "--evaluate needs --resume" in sentence(image_folder, tmp_path, "--evaluate", "--resume", "auto")
    assert "no checkpoint of this program" in sentence(image_folder, tmp_path, "--resume", pretrained)
    torch.save({}, tmp_path / "empty.pth.tar")
    assert "holds no weights" in sentence(image_folder, tmp_path, "--resume", tmp_path / "empty.pth.tar")
    assert "one value a channel" in sentence(image_folder, tmp_path, "--mean", 0.5, "--std", 0.2)


def test_a_checkpoint_of_another_run_is_refused(image_folder, hard_folder, pretrained, tmp_path):
    probe_once(image_folder, tmp_path, "--epochs", 1)
    path = tmp_path / "checkpoint.pth.tar"
    assert "has the class class0, which the classifier" in sentence(hard_folder, tmp_path, "--resume", path)
    assert "--arch test_resnet and" in sentence(image_folder, tmp_path, "-a", "resnet18", "--resume", path)
    assert "trained with -a test_resnet" in sentence(image_folder, tmp_path, "-a", "resnet18", "-e", "--resume", path)
    found = sentence(image_folder, tmp_path, "--resume", path, "--pretrained", pretrained)
    assert "another encoder than --pretrained" in found
    state = files.read(str(path))
    files.write({**state, "run": {**state["run"], "classes": None}}, str(path))
    assert "on other images, 24 of" in sentence(hard_folder, tmp_path, "--resume", path)
    older = {n: value for n, value in state["run"].items() if n not in ("classes", "data", "flags", "torch")}
    files.write({**state, "run": older}, str(path))
    assert "fc.weight differs (2 entries do)" in sentence(hard_folder, tmp_path, "--resume", path)
    files.write({**state, "optimizer": {}}, str(path))
    assert "does not fit this optimizer" in sentence(image_folder, tmp_path, "--resume", path)


def test_a_loss_that_is_not_finite_ends_the_run(hard_folder, tmp_path):
    with pytest.raises(TrainingError, match="lower --lr"):
        probe_once(hard_folder, tmp_path, "--epochs", 4, "--lr", "1e38")


def test_a_source_without_a_pair_is_refused_with_its_reason():
    source = ArraySource("grey", np.zeros((2, 8, 8), np.uint8))
    with pytest.raises(UserError, match=r"no val here.*--val-data"):
        linear.labelled_pair(Sources(source, no_pair="no val here"))


def test_unreadable_images_are_named_once_for_each_set_with_the_reason(capsys, tmp_path):
    log = RunLog(str(tmp_path), tensorboard=False)
    note = bad_image_notes(log.line)
    train, val = (ArraySource(name, np.zeros((200, 8, 8), np.uint8)) for name in ("train", "val"))
    files = FileSource("files", [str(tmp_path / "page.jpg")])
    (tmp_path / "page.jpg").write_bytes(b"<html>")
    batch = {"bad": torch.tensor([-1, 3, -1])}
    for source in (train, train, val):
        note(batch, source)
    note({"bad": torch.tensor([0])}, files)
    *named, last = capsys.readouterr().out.splitlines()
    assert named == ["unreadable image: train[3]", "unreadable image: val[3]"]
    assert last.startswith(f"unreadable image: {tmp_path}/page.jpg (begins like an HTML page")
    log.close()


@pytest.mark.parametrize(
    ("images", "most"), [(1, 0), (8, 4), (15, 7), (200, 100), (10_000, 100), (50_000, 500), (1_281_167, 12_811)]
)
def test_how_many_images_a_measure_may_leave_out(images, most):
    assert most_unreadable(images) == most
    assert most_unreadable(images, 3) == 3
    source = ArraySource("zeros", np.zeros((images, 1, 1), np.uint8))
    check_unread(most, source, "zeros[0]")
    with pytest.raises(TooManyUnreadError, match=rf"^{most + 1} of {images} images of zeros .*first zeros\[0\].*"
                       rf"limit is {most}: .*--max-bad-images {most + 1} "):  # fmt: skip
        check_unread(most + 1, source, "zeros[0]")


@pytest.mark.parametrize(("bad", "refused"), [(7, False), (8, True)])
@pytest.mark.parametrize("kind", [["--features", "views"], ["--features", "cached"], ["--knn"]])
def test_more_than_half_of_the_held_out_images_is_refused_before_a_step(hard_folder, tmp_path, bad, refused, kind):
    images = spoiled(hard_folder, tmp_path / "images", 5)
    for path in sorted((images / "val" / "class0").iterdir())[: bad - 5]:
        path.write_bytes(b"")
    words = [*kind, "--epochs", 1, "--lr", 1]
    if not refused:
        assert probe_once(images, tmp_path / "run", *words)["unreadable"] == 7
        return
    told = sentence(images, tmp_path / "run", *words)
    assert "8 of 15 images of " in told and "(is empty); the limit is 7" in told
    assert not (tmp_path / "run" / "lincls.jsonl").exists()
    assert probe_once(images, tmp_path / "run", *words, "--max-bad-images", 8)["unreadable"] == 8


def test_what_is_refused_after_an_epoch_is_saved_and_goes_on(hard_folder, tmp_path, monkeypatch):
    """Of a set of which not every image is tried at the start."""
    images, words = spoiled(hard_folder, tmp_path / "images", 4), ["--epochs", 1, "--lr", 1, "--seed", 0]
    whole = probe_once(images, tmp_path / "whole", *words)
    monkeypatch.setattr(features_of_images, "TRIED", 3)
    monkeypatch.setattr(features_of_images, "most_unreadable", lambda images, asked=None: 3 if asked is None else asked)
    assert "4 of 15 images of " in sentence(images, tmp_path / "run", *words)
    again = probe_once(images, tmp_path / "run", *words, "--max-bad-images", 4, "--resume", "auto")
    assert {**again, "seed": 0} == {**whole, "seed": 0}


def test_training_images_that_cannot_be_read_are_counted(hard_folder, tmp_path):
    shutil.copytree(hard_folder, tmp_path / "images")
    for path in sorted((tmp_path / "images" / "train" / "class1").iterdir())[:2]:
        path.write_bytes(b"junk")
    for words in (["--features", "views"], ["--features", "cached"]):
        found = probe_once(tmp_path / "images", tmp_path / words[1], *words, "--epochs", 2, "--lr", 1)
        assert (found["train_unreadable"], found["unreadable"]) == (2, 0)
