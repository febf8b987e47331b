"""Fine-tuning on a share of the labels: the protocol, what is selected on what, resume, several processes, mistakes."""

import csv
import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from conftest import differences, records, rounding, run, spoiled
from support.confusions import read_confusion
from support.finetuning import ARCH, MEAN, STD, TINY, sentence, state_of, tune
from torch import nn

import main_semisup
from moco import files, run_folder
from moco.cli import parse_semisup
from moco.config import ObjectiveConfig, ScheduleConfig
from moco.data import open_sources
from moco.errors import TrainingError, UserError
from moco.eval import finetune, finetune_setup
from moco.eval.classifier import backbone_of
from moco.eval.features import EvalData, LabelledBatches
from moco.eval.finetune_loss import Objective
from moco.models.encoder import build_encoder
from moco.train import checkpoint
from moco.train.optimizers import use_fused_optimizer_step
from moco.train.plan import Progress, count_epochs

pytestmark = pytest.mark.usefixtures("restored")


# ------------------------------------------------------------------------------------------------------- flags


def test_syncos_and_barlow_twins_commands_parse_as_typed():
    synco = (
        "-a resnet50 --lr-backbone 0.02 --lr-classifier 0.5 --epochs 60 --train-percent 1 --weights finetune "
        "--batch-size 1024 --pretrained CKPT --dist-url tcp://localhost:10001 --multiprocessing-distributed "
        "--world-size 1 --rank 0 DIR"
    )
    args = parse_semisup(synco.split())
    assert (args.data, args.pretrained, args.train_percent, args.weights) == ("DIR", "CKPT", 1, "finetune")
    assert (args.lr_backbone, args.lr_classifier, args.epochs, args.batch_size) == (0.02, 0.5, 60, 1024)
    barlow = (
        "DIR FILE --weights finetune --train-percent 1 --epochs 20 --lr-backbone 0.005 --lr-classifier 0.5 "
        "--weight-decay 0 --checkpoint-dir OUT --workers 8 --print-freq 100"
    )
    args = parse_semisup(barlow.split())
    assert (args.data, args.pretrained, args.save_dir, args.weight_decay) == ("DIR", "FILE", "OUT", 0)


def test_defaults_are_the_published_recipe():
    args = parse_semisup(["--weights", "finetune", "DIR"])
    assert (args.batch_size, args.lr_classifier, args.lr_backbone) == (1024, 0.5, 0.01)
    assert (args.momentum, args.weight_decay, args.weights, args.amp) == (0.9, 1e-6, "finetune", "off")
    assert (args.train_percent, args.val_share, args.data) == (100, 0, "DIR")
    shares = (1, 100 * 12_811 / 1_281_167, 5, 10, 100 * 128_116 / 1_281_167, 50, 100)
    assert [finetune_setup.epochs_for(share) for share in shares] == [60, 60, 60, 30, 30, 30, 90]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "give an image folder or --dataset NAME"),
        ("DIR --train-percent 0", "--train-percent is above 0 and at most 100"),
        ("DIR --train-percent nan", "--train-percent is above 0"),
        ("DIR --train-percent 101", "--train-percent is above 0"),
        ("DIR --val-share 1", "--val-share is a share"),
        ("DIR --val-only", "--val-only needs --val-share"),
        ("DIR --evaluate", "--evaluate takes --resume"),
        ("DIR --evaluate --resume X --val-share 0.1 --val-only", "--evaluate takes --resume"),
        ("DIR FILE --pretrained X", "two spellings of one flag"),
        ("DIR --lr-backbone -1", "--lr-backbone must be at least 0"),
        ("DIR --max-minutes -1", "--max-minutes must be at least 0"),
        ("DIR --lr-classifier 0", "--lr-classifier must be a number above 0"),
        ("DIR --epochs 0", "--epochs must be at least 1"),
        ("DIR --std 0", "--std must be a number above 0"),
        ("DIR --weights both", "--weights"),
    ],
)
def test_wrong_flags_are_one_sentence_and_exit_code_2(words, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_semisup(words.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert sentence in error
    assert error.count("\n") == 1


# ---------------------------------------------------------------------------------------------------- the protocol


def as_published(encoder: nn.Module, images: LabelledBatches, epochs: int, freeze: bool) -> nn.Module:
    """Barlow Twins' and SynCo's loop, written from their description: SGD with two groups, torch's own cosine."""
    head = [p for name, p in encoder.named_parameters() if name.startswith("fc.")]
    rest = [p for name, p in encoder.named_parameters() if not name.startswith("fc.")]
    groups = [{"params": head, "lr": 0.1}] + ([] if freeze else [{"params": rest, "lr": 0.02}])
    optimizer = torch.optim.SGD(groups, lr=0, momentum=0.9, weight_decay=1e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        encoder.train(not freeze)
        for batch in images.batches(epoch):
            pixels = batch["image"].float() / 255
            pixels = torchvision.transforms.functional.normalize(pixels, MEAN, STD)
            loss = nn.functional.cross_entropy(encoder(pixels), batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        cosine.step()
    return encoder


@pytest.mark.parametrize("weights", ["finetune", "freeze"])
def test_trains_as_the_published_loop(weights, folder, pretrained, tmp_path):
    freeze = weights == "freeze"
    tune(folder, tmp_path, "--pretrained", pretrained, "--weights", weights, "--epochs", 3, "--lr-backbone", 0.02,
         "--wd", 1e-3, "--no-channels-last")  # fmt: skip
    file = {n.removeprefix("module.encoder_q."): v for n, v in files.read(str(pretrained))["state_dict"].items()}
    encoder = build_encoder(ARCH, 3, size=16)
    encoder.load_state_dict({n: v for n, v in file.items() if not n.startswith("fc.")}, strict=False)
    finetune.Classifier(encoder, MEAN, STD, seed=3, freeze=freeze)  # the first weights of the layer
    train = open_sources(path=str(folder)).train
    assert train is not None
    wanted = as_published(encoder, EvalData(16, 8, 3).of(train, training=True), 3, freeze).state_dict()
    found = {n.removeprefix("module."): v for n, v in state_of(tmp_path)["state_dict"].items()}
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
    moved = [n for n, v in file.items() if not n.startswith("fc.") and not torch.equal(v, found[n])]
    assert not moved if freeze else len(moved) == len(file) - 4  # all but the head's four


def test_the_layer_starts_as_published_and_is_the_first_group():
    encoder = build_encoder("resnet18", 10, size=32)
    model = finetune.Classifier(encoder, MEAN, STD, seed=0, freeze=False)
    assert abs(float(encoder.fc.weight.detach().std()) - 0.01) < 3e-4
    assert not encoder.fc.bias.any()
    head, rest = model.groups(0.5, 0.01)
    assert [p is q for p, q in zip(head["params"], (encoder.fc.weight, encoder.fc.bias), strict=True)] == [True, True]
    assert len(head["params"]) + len(rest["params"]) == len(list(encoder.parameters()))
    assert (head["lr"], rest["lr"]) == (0.5, 0.01)
    frozen = finetune.Classifier(encoder, MEAN, STD, seed=0, freeze=True)
    assert [g["lr"] for g in frozen.groups(0.5, 0.01)] == [0.5]
    assert [n for n, p in frozen.named_parameters() if p.requires_grad] == ["encoder.fc.weight", "encoder.fc.bias"]
    assert not any(m.training for m in frozen.train().modules())


def test_rates_follow_the_cosine_of_each_epoch(folder, tmp_path):
    tune(folder, tmp_path, "--epochs", 4, "--train-percent", 20, "--lr-backbone", 0.02)
    rates = {r["epoch"]: (r["lr_classifier"], r["lr_backbone"]) for r in records(tmp_path) if "lr_backbone" in r}
    share = [0.5 * (1 + np.cos(np.pi * epoch / 4)) for epoch in range(4)]
    assert [rates[e] for e in range(4)] == [pytest.approx((0.1 * s, 0.02 * s)) for s in share]


def test_a_frozen_tensor_that_moved_is_noticed():
    model = finetune.Classifier(build_encoder(ARCH, 3, size=16), MEAN, STD, seed=0, freeze=True)
    sgd = torch.optim.SGD(model.groups(0.1, 0.1))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    plan, objective = count_epochs(1, ScheduleConfig(1)), Objective(ObjectiveConfig("ce"), 3)
    tuner = finetune.Tuner(model, sgd, scaler, plan, Progress(0), None, None, {}, objective, [0.1])  # type: ignore
    tuner.frozen = backbone_of(model.encoder)
    tuner.check_frozen()
    model.encoder.bn1.running_mean[0] += 1e-3
    with pytest.raises(TrainingError, match=r"1 tensors that --weights freeze keeps .* the first bn1.running_mean"):
        tuner.check_frozen()


def test_the_checkpoint_is_a_torchvision_network(folder, tmp_path):
    tune(folder, tmp_path, "--epochs", 1, "-a", "resnet18", "--stem", "imagenet", "--train-percent", 20)
    state = state_of(tmp_path)
    assert {"epoch", "arch", "state_dict", "best_acc1", "optimizer"} <= set(state)
    entries = {name.removeprefix("module."): value for name, value in state["state_dict"].items()}
    torchvision.models.resnet18(num_classes=3).load_state_dict(entries)  # strict


# ----------------------------------------------------------------------------------- what is trained and selected on


def test_only_the_share_is_trained_on(folder, tmp_path, monkeypatch):
    seen: set[int] = set()

    def note(tell):
        def look(batch, source):
            if "training" in source.name:
                seen.update(source.rows[i] for i in batch["index"].tolist())

        return look

    monkeypatch.setattr(main_semisup, "bad_image_notes", note)
    found = tune(folder, tmp_path, "--train-percent", 20)
    assert (found["train_images"], found["val_images"], found["test_images"]) == (12, 0, 15)
    train = open_sources(path=str(folder)).train
    assert train is not None
    assert train.labels is not None
    assert len(seen) == 12
    assert np.bincount(train.labels[sorted(seen)]).tolist() == [4, 4, 4]


def test_a_list_is_trained_on(folder, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("0_3.png\n1_4.png\n2_5.png\n2_6.png\n")
    found = tune(folder, tmp_path, "--train-files", names)
    assert found["train_images"] == 4
    assert found["origin"] == f"the list {names}"


def evaluations(monkeypatch) -> list[tuple[int, float]]:
    """(images, top-1) of every evaluation that a run makes from now on."""
    made: list[tuple[int, float]] = []
    original = finetune.evaluate

    def counted(model, images, *more):
        score = original(model, images, *more)
        made.append((images.sampler.n, score.acc1))
        return score

    monkeypatch.setattr(finetune, "evaluate", counted)
    return made


def test_with_a_validation_part_the_test_images_are_seen_once(folder, tmp_path, monkeypatch, capsys):
    made = evaluations(monkeypatch)
    found = tune(folder, tmp_path, "--val-share", 0.1, "--epochs", 3, "--train-percent", 50)
    assert [n for n, _ in made] == [6, 6, 6, 15]
    assert (found["train_images"], found["val_images"], found["test_images"]) == (30, 6, 15)
    assert (found["val_acc1"], found["acc1"], found["epochs"]) == (made[2][1], made[3][1], 3)
    figures = f" * validation Acc@1 {made[2][1]:.3f} (6 validation images) * Acc@1 {made[3][1]:.3f} (15 test images)"
    assert capsys.readouterr().out.splitlines()[-3] == figures
    best = max(acc for _, acc in made[:3])
    assert found["best_val_acc1"] == best == made[found["best_epoch"] - 1][1]
    assert "best_acc1" not in found
    assert [r["epoch"] for r in records(tmp_path) if "val_acc1" in r] == [0, 1, 2]
    steps = max(r["step"] for r in records(tmp_path)) // 3
    assert all(r["epoch"] == (r["step"] - 1) // steps for r in records(tmp_path))
    assert not any("test_acc1" in r for r in records(tmp_path))
    assert state_of(tmp_path, finetune.BEST)["epoch"] == found["best_epoch"]
    assert found["settings"]["lr_backbone"] == 0.01


def test_a_selection_run_needs_no_test_images_and_the_chosen_one_goes_on_to_them(folder, tmp_path, monkeypatch):
    made = evaluations(monkeypatch)
    words = ["--val-share", 0.1, "--train-percent", 50, "--resume", "auto"]
    train_only = tmp_path / "images"
    shutil.copytree(folder / "train", train_only / "train")
    found = tune(train_only, tmp_path, *words, "--val-only")
    assert [n for n, _ in made] == [6, 6]
    assert found["test_images"] == 0
    assert not {"acc1", "acc5", "best_acc1"} & set(found)
    before = state_of(tmp_path)
    shutil.copytree(folder / "val", train_only / "val")
    chosen = tune(train_only, tmp_path, *words)  # finished: nothing is trained
    assert [n for n, _ in made] == [6, 6, 6, 15]
    assert differences(before, state_of(tmp_path)) == []
    straight = tune(train_only, tmp_path / "straight", *words[:4])
    for key in ("val_acc1", "best_val_acc1", "best_epoch", "acc1", "acc5"):
        assert chosen[key] == straight[key], key
    assert chosen["val_acc1"] == found["val_acc1"]


def test_confusions_are_of_the_test_images_else_of_the_validation_part(folder, tmp_path, capsys):
    words = ["--val-share", 0.1, "--epochs", 2, "--train-percent", 50, "--resume", "auto", "--confusion"]
    found = tune(folder, tmp_path, *words, "--val-only", "--per-class", tmp_path / "classes.csv")
    for images, figure in ((6, "val_acc1"), (15, "acc1")):
        matrix, classes = read_confusion((tmp_path / "confusion.csv").read_text())
        assert (int(matrix.sum()), len(classes)) == (images, 3)
        assert 100 * matrix.trace() / images == found[figure]
        rows = list(csv.DictReader((tmp_path / "classes.csv").read_text().splitlines()))
        assert [int(row["images"]) for row in rows] == matrix.sum(1).tolist()
        found = tune(folder, tmp_path, *words, "--per-class", tmp_path / "classes.csv")  # nothing is trained
    assert "15 test images: " in capsys.readouterr().out


def test_without_one_every_epoch_is_evaluated_on_the_test_images(folder, tmp_path, monkeypatch, capsys):
    made = evaluations(monkeypatch)
    found = tune(folder, tmp_path)
    assert [n for n, _ in made] == [15, 15]
    assert found["acc1"] == made[-1][1]
    assert found["best_acc1"] == max(acc for _, acc in made)
    assert "val_acc1" not in found
    assert capsys.readouterr().out.splitlines()[-3] == f" * Acc@1 {found['acc1']:.3f} (15 test images)"
    capsys.readouterr()
    again = tune(folder, tmp_path, "--evaluate", "--resume", "auto", "--lr-backbone", 9, result="evaluate.json")
    said = capsys.readouterr().out
    assert " images to test on\n" in said and "to train on" not in said and "epochs of" not in said
    assert (again["acc1"], again["mode"]) == (found["acc1"], "evaluate")


# ------------------------------------------------------------------------------------------------------- resume


def test_resumed_after_every_step_is_the_same_run(folder, tmp_path):
    words = ["--train-percent", 50, "--val-share", 0.1]
    whole = tune(folder, tmp_path / "whole", *words)
    for step in range(8):  # two epochs of four steps
        assert tune(folder, tmp_path / "parts", *words, "--resume", "auto", "--max-minutes", 0, code=75) == {}
        position = state_of(tmp_path / "parts")
        assert (position["epoch"], position["run"]["batch"]) == ((0, step + 1) if step < 4 else (1, step - 3))
    parts = tune(folder, tmp_path / "parts", *words, "--resume", "auto")
    one, two = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    assert differences(one, two) == []
    keys = ("val_acc1", "val_acc5", "best_val_acc1", "best_epoch", "acc1", "acc5", "epochs")
    assert [whole[k] for k in keys] == [parts[k] for k in keys]
    curves = [[r for r in records(tmp_path / name) if "val_acc1" in r] for name in ("whole", "parts")]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 2


def test_the_released_codes_checkpoint_goes_on(folder, tmp_path):
    tune(folder, tmp_path, "--train-percent", 50)
    path = tmp_path / finetune.CHECKPOINT
    state = files.read(str(path))
    for name in ("run", "scaler"):
        del state[name]
    for group in state["optimizer"]["param_groups"]:
        group["initial_lr"] = group["lr"]
    released = {**state, "epoch": 1, "best_acc1": torch.tensor([33.0]), "scheduler": {"last_epoch": 1}}
    torch.save(released, tmp_path / "theirs.pth.tar")
    found = tune(folder, tmp_path / "on", "--train-percent", 50, "--resume", tmp_path / "theirs.pth.tar")
    assert found["epochs"] == 2
    assert found["best_acc1"] >= 33.0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--lr-backbone", 0.02], "is of a run with --lr-backbone 0.01 and this one has 0.02"),
        (["--train-percent", 60], "is of a run with training images"),
        (["--subset-seed", 1], "is of a run with training images"),
        (["--val-share", 0.1], "is of a run with validation images none and this one has"),
        (["--weights", "freeze"], "is of a run with --weights finetune and this one has freeze"),
        (["-a", "resnet18"], "is of a run with --arch test_resnet and this one has resnet18"),
    ],
)
def test_another_run_is_not_continued(words, sentence, folder, done, capsys):
    with pytest.raises(UserError, match=sentence):
        tune(folder, done, "--train-percent", 50, "--resume", "auto", *words)


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    """The folder of a finished run."""
    save_dir = tmp_path_factory.mktemp("done")
    tune(folder, save_dir, "--train-percent", 50)
    return save_dir


# ---------------------------------------------------------------------------------------------- several processes


def run_all(commands: list[list[str]], args) -> int:
    """The program several times in the processes of one launch."""
    return max(main_semisup.worker(parse_semisup(words)) for words in commands)


def test_test_images_that_cannot_be_read_are_not_counted(folder, tmp_path, capsys):
    damaged = spoiled(folder, tmp_path / "damaged", 4)
    shutil.copytree(damaged, tmp_path / "without")
    for path in sorted((tmp_path / "without" / "val" / "class1").iterdir())[:4]:
        path.unlink()
    found = []
    for name in ("damaged", "without"):
        found.append(tune(tmp_path / name, tmp_path / "runs" / name, "--train-percent", 50))
        lines = capsys.readouterr().out.splitlines()
        unread = "; 4 of 15 images cannot be read and are not counted" * (name == "damaged")
        (last,) = (line for line in lines if line.startswith(" * Acc@1"))
        assert last == f" * Acc@1 {found[-1]['acc1']:.3f} (11 test images{unread})"
        assert sum(bool(re.match(rf"epoch .* epochs?\){re.escape(unread)}$", line)) for line in lines) == 2
    assert [(x["test_images"], x["unreadable"]) for x in found] == [(11, 4), (11, 0)]
    assert [found[0][key] for key in ("acc1", "best_acc1")] == [found[1][key] for key in ("acc1", "best_acc1")]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=rounding(20 * 9 * 64))  # 20 layers
    assert found[0]["acc5"] is None
    assert found[0]["not_measured"]["acc5"] == "100 % by definition: 3 classes"
    for path in (damaged / "val").rglob("*.png"):
        path.write_bytes(b"no picture")
    assert "none of 15 images tried" in sentence(damaged, tmp_path / "none", "--train-percent", 50)


def test_classes_are_found_by_name(folder, tmp_path, capsys):
    """A part of the classes, whose folders are numbered otherwise, is measured as in the whole."""
    words = ["--train-percent", 50, "--val-share", 0.2, "--epochs", 4]
    tune(folder, tmp_path, *words)
    path = tmp_path / finetune.CHECKPOINT
    assert state_of(tmp_path)["run"]["classes"] == ["class0", "class1", "class2"]
    parts = {}
    for kept in range(3):
        parts[kept] = tmp_path / f"part{kept}"
        for split in ("train", "val"):
            shutil.copytree(folder / split / f"class{kept}", parts[kept] / split / f"class{kept}")
    evaluate = ["--evaluate", "--resume", path]
    whole = tune(folder, tmp_path / "out", *evaluate, result="evaluate.json")
    capsys.readouterr()
    found = [tune(part, tmp_path / "out", *evaluate, result="evaluate.json") for part in parts.values()]
    firsts = [line for line in capsys.readouterr().out.splitlines() if line.startswith(ARCH)]
    assert all("classes numbered as in that file, by name (1 of its 3)" in line for line in firsts)
    assert not any("baseline" in line for line in firsts)
    assert sum(x["acc1"] for x in found) / 3 == pytest.approx(whole["acc1"])
    assert whole["acc1"] > 40
    assert "lacks the class class1" in sentence(parts[0], tmp_path / "out", *words, "--resume", path)
    for split in ("train", "val"):
        (parts[0] / split / "class0").rename(parts[0] / split / "class9")
    assert "has the class class9, which the classifier in" in sentence(parts[0], tmp_path / "out", *evaluate)
    state = state_of(tmp_path)
    del state["run"]["classes"]
    torch.save(state, tmp_path / "old.pth.tar")
    old = tune(folder, tmp_path / "out", "--evaluate", "--resume", tmp_path / "old.pth.tar", result="evaluate.json")
    assert old["acc1"] == whole["acc1"]
    assert "the names of its classes are not in the file" in capsys.readouterr().out


@pytest.mark.dist
def test_two_processes_equal_one(folder, pretrained, tmp_path, start):
    """Without BatchNorm (each process has its own batch statistics, as upstream), with a frozen encoder or --syncBN."""

    folder = spoiled(folder, tmp_path / "images", 1)

    def words(name, where):
        own = {
            "vit": ["-a", "test_vit", "--size", "160", "--epochs", "1", "--train-percent", "30"],
            "freeze": ["--weights", "freeze", "--pretrained", str(pretrained), "--confusion"],
            "syncBN": ["--pretrained", str(pretrained), "--syncBN", "--epochs", "1", "--train-percent", "50"],
            "batchnorm": ["--pretrained", str(pretrained)],
        }[name]  # fmt: skip
        return [str(folder), *TINY, *own, "--val-share", "0.2", "--save-dir", str(tmp_path / where / name)]

    names = ("vit", "freeze", "syncBN", "batchnorm")
    program = start("--nproc", 2, "DIR", main=partial(run_all, [words(name, "two") for name in names]))
    assert run_all([words(name, "one") for name in names], None) == 0
    assert program.end() == 0, program.text
    for name in names[:3]:
        one, two = (tmp_path / where / name for where in ("one", "two"))
        for key, value in state_of(one)["state_dict"].items():
            torch.testing.assert_close(state_of(two)["state_dict"][key], value, rtol=1e-4, atol=1e-5, msg=key)
        losses = [[r["loss"] for r in records(where) if "loss" in r] for where in (one, two)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        results = [json.loads((where / "result.json").read_text()) for where in (one, two)]
        assert [r["acc1"] for r in results] == [results[0]["acc1"]] * 2
        assert [(r["test_images"], r["unreadable"]) for r in results] == [(14, 1)] * 2
        if name == "freeze":
            tables = [read_confusion((where / "confusion.csv").read_text()) for where in (one, two)]
            for matrix, classes in tables:
                assert (int(matrix.sum()), len(classes)) == (14, 3)
                assert 100 * matrix.trace() / 14 == results[0]["acc1"]
    # BatchNorm's running statistics differ between processes; what is measured is what the checkpoint holds.
    two = tmp_path / "two" / "batchnorm"
    measured = json.loads((two / "result.json").read_text())
    words_again = [*words("batchnorm", "two"), "--evaluate", "--resume", "auto"]
    assert run_all([words_again], None) == 0
    again = json.loads((two / "evaluate.json").read_text())
    assert (again["acc1"], again["loss"]) == (measured["acc1"], pytest.approx(measured["loss"], rel=1e-5))


@pytest.mark.dist
def test_sigterm_saves_the_step_and_ends(folder, tmp_path, start):
    words = [str(folder), *TINY, "--epochs", "100000", "-p", "1", "--save-dir", str(tmp_path)]
    program = start("--nproc", 2, "DIR", main=partial(run_all, [words]))
    program.wait_for("Epoch: [1]")
    program.process.terminate()
    assert program.end() == 143, program.text
    state = state_of(tmp_path)
    assert "stopped after" in program.text
    assert f"of epoch {state['epoch']}" in program.text
    assert state["run"]["batch"] > 0 or state["epoch"] > 0
    assert "Traceback" not in program.text


# ------------------------------------------------------------------------------------------------------- mistakes


def test_a_mistake_is_one_sentence_and_exit_code_2(folder, pretrained, tmp_path):
    words = [*TINY, "--save-dir", tmp_path, "-a", "resnet18", "--pretrained", pretrained, folder]
    done = run("main_semisup.py", *words)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert "does not fit the encoder" in done.stderr


def test_mistakes_with_data_and_files(folder, pretrained, tmp_path, done):
    assert "held-out" in sentence(folder / "train", tmp_path)
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(folder / "train" / "class0" / "0_0.png", flat)
    assert "has no labels" in sentence(flat, tmp_path, "--val-share", 0.1, "--val-only")
    names = tmp_path / "names.txt"
    names.write_text("0_0.png\nn01440764_18.JPEG\n")
    assert "1 of the 2 images" in sentence(folder, tmp_path, "--train-files", names)
    assert "--train-files" in sentence(folder, tmp_path, "--train-files", tmp_path / "none.txt")
    assert "--val-share 0.99" in sentence(folder, tmp_path, "--val-share", 0.99)
    assert "no checkpoint at" in sentence(folder, tmp_path, "--pretrained", tmp_path / "none.pth.tar")
    assert "no checkpoint at" in sentence(folder, tmp_path, "--resume", tmp_path / "none.pth.tar")
    assert "no checkpoint at" in sentence(folder, tmp_path, "--evaluate", "--resume", tmp_path / "none.pth.tar")
    assert "no checkpoint of this program" in sentence(folder, tmp_path, "--resume", pretrained)
    torch.save({}, tmp_path / "empty.pth.tar")
    assert "holds no weights" in sentence(folder, tmp_path, "--resume", tmp_path / "empty.pth.tar")
    assert "too few for BatchNorm" in sentence(folder, tmp_path, "-b", 59)
    assert "strided convolution" in sentence(folder, tmp_path, "-a", "resnet18", "--stem", "imagenet", "--amp", "bf16")
    other = ["--train-percent", 50, "--resume", tmp_path / "other.pth.tar"]
    state = state_of(done)
    torch.save({**state, "optimizer": {}}, other[-1])
    assert "does not fit this optimizer" in sentence(folder, tmp_path, *other)
    del state["state_dict"]["module.fc.bias"]
    torch.save(state, other[-1])
    assert "fc.bias differs" in sentence(folder, tmp_path, *other)
    assert not (tmp_path / finetune.CHECKPOINT).exists()


def test_another_runs_folder_is_left_alone(folder, tmp_path):
    tune(folder, tmp_path, "--train-percent", 50, "--epochs", 1)
    before = state_of(tmp_path)
    assert "already holds checkpoint_semisup.pth.tar of another run" in sentence(folder, tmp_path, "--epochs", 1)
    assert differences(before, state_of(tmp_path)) == []
    state = tmp_path / finetune.CHECKPOINT
    state.rename(tmp_path / "kept")
    (tmp_path / finetune.RESULT).write_text("{}")
    with pytest.raises(UserError, match="holds result.json of another run; choose another"):  # as a probe's is
        main_semisup.worker(parse_semisup([str(folder), *TINY, "--save-dir", str(tmp_path)]))
    (tmp_path / "kept").rename(state)
    checkpoint.reserve_run_folder(str(tmp_path), None, True, *finetune.TUNING_FILES)
    assert not (tmp_path / finetune.RESULT).exists()
    assert not (tmp_path / finetune.CHECKPOINT).exists()
    assert not (tmp_path / finetune.BEST).exists()
    assert run_folder.newest_good(str(tmp_path), finetune.CHECKPOINT) == run_folder.Found(told=[])


def test_a_loss_that_is_not_finite_ends_the_run_before_the_step(folder, tmp_path, monkeypatch):
    stepped = []
    original = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *words: stepped.append(1) or original(self, *words))
    with pytest.raises(TrainingError, match="epoch 0, step 1: .* is not finite and the step was not taken; lower --lr"):
        tune(folder, tmp_path, "--lr-backbone", "1e30", "--lr-classifier", "1e30")
    assert len(stepped) == 1
    assert not (tmp_path / finetune.CHECKPOINT).exists()


def by_the_device(monkeypatch) -> None:
    """Fine-tuning as on a GPU: the step is called off there, and the host looks later."""
    original = finetune.Tuner.__post_init__

    def prepare(self):
        original(self)
        self.look_every = 10
        use_fused_optimizer_step(self.optimizer)

    monkeypatch.setattr(finetune.Tuner, "__post_init__", prepare)


def test_a_device_decides_as_the_host_would(folder, tmp_path, monkeypatch):
    words = ["--epochs", 2, "--ema", 0.5, "--train-percent", 50, "-p", 1000]
    tune(folder, tmp_path / "host", *words)
    with monkeypatch.context() as patch:
        by_the_device(patch)
        patch.setattr(finetune.Tuner, "sync_outcomes", watched := Watched(finetune.Tuner.sync_outcomes))
        tune(folder, tmp_path / "device", *words)
    assert watched.waiting == [4, 4]  # only where an epoch ends
    host, device = (state_of(tmp_path / name) for name in ("host", "device"))
    for part in ("state_dict", "trained"):
        for name, value in host[part].items():
            torch.testing.assert_close(device[part][name], value, rtol=1e-4, atol=1e-5)
    assert host["run"]["batch"] == device["run"]["batch"]


class Watched:
    """A look that notes how many steps wait for it."""

    def __init__(self, original):
        self.original, self.waiting = original, []

    def __get__(self, tuner, kind):
        def look():
            self.waiting += [len(tuner.pending_flags)] * bool(tuner.pending_flags)
            return self.original(tuner)

        return look


def test_a_device_calls_off_a_step_that_is_not_finite_and_the_next_look_says_so(folder, tmp_path, monkeypatch):
    by_the_device(monkeypatch)
    seen = []
    original = finetune.Tuner.sync_outcomes

    def look(self):
        seen.append(all(bool(p.isfinite().all()) for p in self.model.parameters()))
        return original(self)

    monkeypatch.setattr(finetune.Tuner, "sync_outcomes", look)
    with pytest.raises(TrainingError, match="epoch 0, step 1: .* is not finite and the step was not taken; lower --lr"):
        tune(folder, tmp_path, "--lr-backbone", "1e30", "--lr-classifier", "1e30", "-p", 1000)
    assert seen == [True]
    assert not (tmp_path / finetune.CHECKPOINT).exists()
