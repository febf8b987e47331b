"""The online probe against a plain linear layer, and a run with it against the same run without it."""

import functools
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SYNCO, TINY, differences, load, records
from torch import nn

import main_pretrain
from moco import cli, distributed, files
from moco.data import ArraySource, open_sources
from moco.errors import UserError
from moco.eval.features import EvalData, FeatureExtractor
from moco.models.encoder import build_encoder
from moco.train.online_probe import RATE, OnlineProbe, begin_probe
from moco.weights.average import average
from moco.weights.describe import describe_file

WIDTH, CLASSES = 6, 3


class Backbone(nn.Module):
    """Features are the images themselves."""

    head_name = "fc"

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


LABELS = torch.tensor([0, 1, 2, -1, 0, 0, 0, -7])  # no class has a third: its first gradient would be rounding
GOOD, BAD = torch.tensor(False), torch.tensor(True)


def made() -> tuple[Backbone, OnlineProbe]:
    encoder = Backbone()
    return encoder, OnlineProbe(encoder, LABELS, list("abc"), CLASSES)


def views(number: int) -> torch.Tensor:
    """(8, 6) features of the images, one view of each, of other lengths."""
    g = torch.Generator().manual_seed(number)
    return (torch.randn(8, WIDTH, generator=g) + 2) * torch.rand(8, 1, generator=g) * 100


def steps(encoder: Backbone, probe: OnlineProbe, mine: slice, numbers: list[int], bad: torch.Tensor = GOOD) -> None:
    """A step of two batches a number, each of two views of the images of this process."""
    for number in numbers:
        for batch in (0, 1):
            for view in (0, 1):
                encoder(views(4 * number + 2 * batch + view)[mine])
            probe.add(torch.arange(8)[mine])
        probe.step(bad)


def test_it_is_a_linear_layer_trained_by_adam():
    encoder, probe = made()
    layer = nn.Linear(WIDTH, CLASSES)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    optimizer = torch.optim.Adam(layer.parameters(), lr=RATE / WIDTH)
    norm = nn.BatchNorm1d(WIDTH, affine=False).eval()  # by its running statistics
    right = 0
    for number in range(3):
        x = torch.cat([views(4 * number + i) for i in range(4)])
        rows, labels = x / x.square().mean(1, keepdim=True).sqrt(), LABELS.repeat(4)
        x = norm(rows)
        x, labels = x[labels >= 0], labels[labels >= 0]
        logits = layer(x)
        right += int((logits.argmax(1) == labels).sum())
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        norm.running_mean.lerp_(rows.mean(0), 0.1)  # type: ignore[union-attr]
        norm.running_var.lerp_(rows.var(0, correction=0), 0.1)  # type: ignore[union-attr]
        steps(encoder, probe, slice(None), [number])
    torch.testing.assert_close(probe.weight, layer.weight, rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(probe.bias, layer.bias, rtol=1e-3, atol=2e-5)
    assert float(probe.weight.detach().abs().min()) > 0
    assert probe.train_accuracy() == {"online_acc1": pytest.approx(100 * right / (3 * 4 * 6))}
    assert probe.train_accuracy() == {}  # of no images
    x = views(99)
    found = probe.accuracy(x, LABELS)
    wanted = layer(norm(x / x.square().mean(1, keepdim=True).sqrt())).argmax(1)
    assert found == pytest.approx(100 * float((wanted == LABELS).sum()) / 6)


def test_no_gradient_enters_the_encoder_and_no_random_number_is_taken():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    encoder = Backbone()
    after = torch.get_rng_state()
    probe = OnlineProbe(encoder, LABELS, list("abc"), CLASSES)
    x = views(0).requires_grad_()
    encoder(x)
    probe.add(torch.arange(8))
    probe.step(GOOD)
    assert x.grad is None and all(p.grad is None for p in encoder.parameters())
    assert torch.equal(torch.get_rng_state(), after)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]  # type: ignore[union-attr]


def test_a_step_that_is_none_moves_nothing():
    """The run's was bad, the features are not finite, or no image has a label."""
    (encoder, probe), (other, reference) = made(), made()
    steps(encoder, probe, slice(None), [0, 1])
    steps(other, reference, slice(None), [0, 1])
    steps(encoder, probe, slice(None), [2], BAD)
    steps(encoder, probe, slice(3, 4), [2])
    before = probe.train_accuracy()
    for x in (views(0) * torch.nan, views(0) * torch.inf):
        for bad in (BAD, GOOD):
            encoder(x)
            probe.add(torch.arange(8))
            probe.step(bad)
    assert before == reference.train_accuracy()
    steps(encoder, probe, slice(None), [3])
    steps(other, reference, slice(None), [3])
    assert differences(probe.state_dict(), reference.state_dict()) == []
    assert all(bool(value.isfinite().all()) for value in probe.state_dict()["layer"].values())


def test_what_is_measured_is_not_trained_on():
    encoder, probe = made()
    encoder.eval()
    encoder(views(0))
    encoder.train()
    steps(encoder, probe, slice(None), [1])
    other, reference = made()
    steps(other, reference, slice(None), [1])
    assert differences(probe.state_dict(), reference.state_dict()) == []


# ------------------------------------------------------------------------------------------------ a whole run


WORDS = [*TINY, "--knn-every", "1", "--knn-k", "3", "--epochs", "2", "--rankme-every", "0"]
WITHOUT_QUEUE = [word for word in WORDS if word not in ("--moco-k", "20")]
RUNS = {
    "synco, accum": [*WORDS, *SYNCO, "--accum", "2", "--no-drop-last"],
    "symmetric, bf16": [*WORDS, "--symmetric", "--amp", "bf16", "--size", "32"],
    "recomputed, averaged": [*WORDS, "--recompute", "--ema", "0.5"],
    "three views": [*WITHOUT_QUEUE, "--method", "simclr", "--views", "3"],
    "moco_v3": [*WITHOUT_QUEUE, "--method", "moco_v3", "--moco-mlp-dim", "16"],
}


def without_probe(found: list[dict]) -> list[dict]:
    """Records without what the probe adds, and without times."""
    times = ("images_per_second", "wait_share", "eta_seconds")
    return [{n: v for n, v in record.items() if not n.startswith("online") and n not in times} for record in found]


@pytest.mark.parametrize("words", RUNS.values(), ids=RUNS)
def test_a_run_is_bit_for_bit_the_run_without_it(words, image_folder, tmp_path, in_process, capsys):
    for switch in ("--online-probe", "--no-online-probe"):
        assert in_process(*words, image_folder, switch, "--save-dir", tmp_path / switch) == 0
    one, other = (load(tmp_path / name) for name in ("--online-probe", "--no-online-probe"))
    assert differences(one.pop("online_probe"), {}) != []
    assert differences(one, other) == []
    logs = [records(tmp_path / name) for name in ("--online-probe", "--no-online-probe")]
    assert without_probe(logs[0]) == without_probe(logs[1])
    assert all("online_acc1" in record for record in logs[0] if "loss" in record)
    assert all("online_val_acc1" in record for record in logs[0] if "knn" in record)
    assert not any(name.startswith("online") for record in logs[1] for name in record)
    text = capsys.readouterr().out
    assert text.count("online probe: a linear classifier of 2 classes") == 1
    assert " % on held-out images" in text and ", online probe " in text


def two_processes(folder, images, out, args: object) -> int:
    """Of two processes: the gradients' mean, and a run with the probe and without it."""
    encoder, probe = made()
    half = 8 // distributed.world_size()
    steps(encoder, probe, slice(distributed.rank() * half, (distributed.rank() + 1) * half), [0, 1, 2])
    same = all(distributed.same_on_all_ranks(value) for value in probe.state_dict()["layer"].values())
    if distributed.is_main():
        files.write({**probe.state_dict()["layer"], **probe.train_accuracy(), "same": same}, str(out))
    for switch in ("--online-probe", "--no-online-probe") if distributed.world_size() > 1 else ():
        words = [*WORDS, "--epochs", "1", str(images), switch, "--save-dir", str(folder / switch)]
        assert main_pretrain.worker(cli.parse_pretrain(words)) == 0
    return 0


@pytest.mark.dist
def test_two_processes_train_what_one_does_and_change_no_bit(image_folder, tmp_path, start, alone):
    work = functools.partial(two_processes, tmp_path, image_folder)
    program = start("--nproc", 2, "unused", main=functools.partial(work, tmp_path / "two"))
    assert program.end() == 0, program.text
    work(tmp_path / "one", None)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two"))
    assert two["same"] and two["online_acc1"] == pytest.approx(one["online_acc1"])
    for name in ("weight", "bias", "mean", "var"):
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=2e-5)
    one, other = (load(tmp_path / name) for name in ("--online-probe", "--no-online-probe"))
    assert one.pop("online_probe")["layer"]["weight"].any()
    assert differences(one, other) == []
    assert program.text.count("online probe: a linear classifier") == 1


def test_its_held_out_accuracy_is_of_the_features_that_knn_reads(image_folder, tmp_path, in_process):
    assert in_process(*WORDS, image_folder, "--save-dir", tmp_path) == 0
    state = load(tmp_path)
    encoder = build_encoder("test_resnet", 16, size=16)
    prefix = "module.encoder_q."
    encoder.load_state_dict({n.removeprefix(prefix): v for n, v in state["state_dict"].items() if n.startswith(prefix)})
    val = open_sources(None, str(image_folder)).val
    assert val is not None
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    share = FeatureExtractor(EvalData(16, 8), torch.device("cpu"), mean, std).shard(encoder, val)
    layer = state["online_probe"]["layer"]
    x = (F.rms_norm(share.x, share.x.shape[1:]) - layer["mean"]) / (layer["var"] + 1e-5).sqrt()
    logits = x @ layer["weight"].T + layer["bias"]
    wanted = 100 * float((logits.argmax(1) == share.labels).double().mean())
    assert [r["online_val_acc1"] for r in records(tmp_path) if "knn" in r][-1] == pytest.approx(wanted)


# ------------------------------------------------------------------------------------------------ checkpoints


def test_a_resumed_run_goes_on_with_its_probe(image_folder, tmp_path, in_process, capsys):
    words = [*WORDS, "--knn-every", "0", image_folder, "--save-dir"]
    assert in_process(*words, tmp_path / "whole", "--steps", 5) == 0
    assert in_process(*words, tmp_path / "parts", "--steps", 2) == 0
    assert in_process(*words, tmp_path / "parts", "--steps", 5, "--resume", "auto") == 0
    assert differences(load(tmp_path / "whole"), load(tmp_path / "parts")) == []
    assert "the online probe begins" not in capsys.readouterr().out
    state = load(tmp_path / "whole")
    del state["online_probe"]
    files.write(state, str(tmp_path / "old.pth.tar"))
    assert in_process(*words, tmp_path / "old", "--steps", 6, "--resume", tmp_path / "old.pth.tar") == 0
    assert "the online probe begins here: " in capsys.readouterr().out
    assert "online_probe" in load(tmp_path / "old")


def images_of(labels: list[int], classes: list[str] | None) -> ArraySource:
    return ArraySource("x", np.zeros((len(labels), 8, 8), np.uint8), 1, classes, np.array(labels))


def test_another_runs_classes_begin_anew_and_damage_is_refused():
    encoder, probe = made()
    steps(encoder, probe, slice(None), [0, 1])
    state = {"online_probe": probe.state_dict()}
    source = images_of(LABELS.tolist(), list("abc"))
    again, said = begin_probe(Backbone(), source, None, state, "FILE")
    assert again is not None and len(said) == 1
    assert differences(again.state_dict(), probe.state_dict()) == []
    for classes in (["a", "b", "d"], list("abcd")):
        anew, said = begin_probe(Backbone(), images_of(LABELS.tolist(), classes), None, state, "FILE")
        assert anew is not None and not anew.weight.any()
        assert said[1] == "the online probe begins anew: that of FILE is of other classes"
    spoil = {"layer": {**probe.state_dict()["layer"], "weight": probe.weight.detach() * torch.nan}}
    for entries in (spoil, {"optimizer": {}}, {"layer": {"weight": probe.weight.detach()}}):
        with pytest.raises(UserError, match="damaged"):
            begin_probe(Backbone(), source, None, {"online_probe": state["online_probe"] | entries}, "FILE")


def test_what_reads_a_checkpoint_leaves_it_alone(image_folder, tmp_path, in_process):
    """Names and weights are those of a file without it; moco describe says that it is there."""
    assert in_process(*WORDS, "--knn-every", "0", image_folder, "--save-dir", tmp_path) == 0
    paths = [str(tmp_path / f"checkpoint_{epoch:04d}.pth.tar") for epoch in (0, 1)]
    assert "online probe: 2 classes on 96 features, beside the training" in describe_file(paths[1])
    mean, _ = average(paths)
    assert "online_probe" not in mean
    bare = []
    for number, path in enumerate(paths):
        state = files.read(path)
        del state["online_probe"]
        bare.append(str(tmp_path / f"bare{number}.pth.tar"))
        files.write(state, bare[-1])
    assert differences(mean["state_dict"], average(bare)[0]["state_dict"]) == []
    assert not any(name.startswith("module.online") for name in load(tmp_path)["state_dict"])


# ----------------------------------------------------------------------------------------------------- when


def test_it_is_there_where_images_have_labels(monkeypatch):
    begin = functools.partial(begin_probe, Backbone(), state={}, path=None)
    labelled = images_of([0, 1, 1], ["a", "b"])
    assert begin(labelled, None)[0] is not None
    assert begin(labelled, False) == (None, [])
    partly = begin(images_of([0, -1, 1], ["a", "b"]), None)[0]
    assert partly is not None and partly.labels.tolist() == [0, -1, 1]
    none = ArraySource("x", np.zeros((3, 8, 8), np.uint8), 1)
    several = images_of([0, 1, 1], ["a", "b"])
    several.labels = np.eye(3, dtype=np.int64)
    for source in (none, several, images_of([0, 0], ["a"]), images_of([-1, -1], ["a", "b"])):
        assert begin(source, None) == (None, [])
        with pytest.raises(UserError, match="--online-probe: x has "):
            begin(source, True)
    monkeypatch.setattr("moco.train.online_probe.MOST_CLASSES", 1)
    probe, said = begin(labelled, None)
    assert probe is None and said == ["no online probe, as there are 2 classes; --online-probe asks for it"]
    assert begin(labelled, True)[0] is not None
    assert json.dumps(said)
