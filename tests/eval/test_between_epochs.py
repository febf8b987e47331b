"""What pretraining measures between epochs: what the commands do, from one pass, and the run stays as it is."""

import functools
import json
import math

import numpy as np
import pytest
import torch
from conftest import TINY, differences, load, records
from support.refused import one_sentence

from moco import distributed
from moco import retrieval as retrieval_door
from moco.data import ArraySource
from moco.eval import retrieval
from moco.eval.features import EvalData, FeatureExtractor, Features, gathered
from moco.models.encoder import build_encoder

PRETRAIN = [*TINY, "--epochs", "3", "--knn-k", "3"]


def two_way(record: dict) -> dict[str, dict[str, float]]:
    """features and head of a record, as retrieval.json has them."""
    ways = {way: {name: record[f"{way}/{name}"] for name in retrieval.MEASURES} for way in ("features", "head")}
    assert len(set(record) & {f"{way}/{name}" for way in ways for name in ways[way]}) == 12
    return ways


@pytest.mark.parametrize("method", [["--ema", "0.5"], ["--method", "supcon"]], ids=["moco, averaged", "supcon"])
def test_both_ways_are_what_the_command_finds_in_the_checkpoint(method, image_folder, tmp_path, in_process, passes):
    words = [*PRETRAIN, *method, image_folder, "--save-dir", tmp_path]
    words = [word for word in words if word not in ("--moco-k", "20")] if "supcon" in method else words
    assert in_process(*words, "--knn-every", 1, "--retrieval-every", 2) == 0
    assert passes == [8, 24] * 3  # held-out images once an epoch, for both
    found = [record for record in records(tmp_path) if "features/ami" in record]
    assert [record["epoch"] for record in found] == [1, 2]  # every two, and the last
    measured = [record for record in records(tmp_path) if "knn" in record]
    assert [record["epoch"] for record in measured] == [0, 1, 2]
    for record in [*measured, *found]:
        assert load(tmp_path / f"checkpoint_{record['epoch']:04d}.pth.tar")["epoch"] == record["finished_epochs"]
    for record in found:
        file = tmp_path / f"checkpoint_{record['epoch']:04d}.pth.tar"
        out = tmp_path / "command"
        flags = ["-a", "test_resnet", "--size", "16", "-b", "8", "-j", "0", "--seed", "3", "--out", str(out)]
        assert retrieval_door.main([str(file), str(image_folder), *flags]) == 0
        told = json.loads((out / "retrieval.json").read_text())
        for way, measures in two_way(record).items():
            assert measures == pytest.approx(told[way], abs=1e-6), way


def test_every_record_names_the_epoch_of_its_step(image_folder, tmp_path, in_process):
    """Three steps an epoch; the last epoch ends inside."""
    words = [*PRETRAIN, "--steps", 5, "--knn-every", 1, "--retrieval-every", 1, image_folder, "--save-dir", tmp_path]
    assert in_process(*words) == 0
    found = records(tmp_path)
    assert len(found) == 5 + 2 + 2 + 2  # steps, k-NN, retrieval, RankMe
    assert [record["epoch"] for record in found] == [(record["step"] - 1) // 3 for record in found]
    assert [record["finished_epochs"] for record in found if "knn" in record] == [1, 1]


def test_the_run_itself_is_the_one_without(image_folder, tmp_path, in_process, passes, capsys):
    for name, every in (("without", 0), ("with", 1)):
        words = [*PRETRAIN, "--retrieval-every", every, image_folder, "--save-dir", tmp_path / name]
        assert in_process(*words) == 0
    assert passes == [8] * 3  # and k-NN is off
    assert differences(load(tmp_path / "without"), load(tmp_path / "with")) == []
    assert not [name for record in records(tmp_path / "without") for name in record if "/" in name]
    assert "epoch 2: retrieval among 8 held-out images\n   features: precision_at_1" in capsys.readouterr().out


def test_the_moving_average_is_what_is_measured(image_folder, tmp_path, in_process, monkeypatch):
    read, original = [], FeatureExtractor._passes

    def watch(self, encoder, *others):
        read.append({name: value.clone() for name, value in encoder.state_dict().items()})
        return original(self, encoder, *others)

    monkeypatch.setattr(FeatureExtractor, "_passes", watch)
    words = [*TINY, "--ema", 0.5, "--steps", 2, "--knn-every", 1, "--retrieval-every", 1, "--save-dir", tmp_path]
    assert in_process(*words, image_folder) == 0
    state = load(tmp_path)["state_dict"]
    average, trained = ({n: state[f"module.encoder_{which}.{n}"] for n in read[0]} for which in ("ema", "q"))
    assert len(read) == 2
    assert all(differences(found, average) == [] for found in read)
    assert differences(trained, average)


def coloured(n: int) -> ArraySource:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 200, (n, 16, 16, 3), dtype=np.uint8)
    return ArraySource("coloured", images, classes=["red", "green", "blue"], labels=np.arange(n) % 3)


def both_ways(out, args: object) -> int:
    torch.manual_seed(0)
    encoder = build_encoder("test_resnet", 5, size=16).eval()
    extractor = FeatureExtractor(EvalData(16, 8), torch.device("cpu"), (0.5,) * 3, (0.2,) * 3)
    share = extractor.shard(encoder, coloured(31), head=True)
    values, _ = retrieval.both_ways(share, seed=0)
    whole = gathered(share, torch.device("cpu"))
    assert whole.ids.tolist() == list(range(31))
    assert whole.z is not None and whole.z.shape == (31, 5)
    if distributed.is_main():
        out.write_text(json.dumps({"values": values, "parts": distributed.world_size()}))
    return 0


@pytest.mark.dist
def test_two_processes_measure_what_one_does(tmp_path, start, in_process):
    program = start("--nproc", 2, "unused", main=functools.partial(both_ways, tmp_path / "two.json"))
    assert program.end() == 0, program.text
    both_ways(tmp_path / "one.json", None)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one["parts"], two["parts"]) == (1, 2)
    assert two["values"] == pytest.approx(one["values"], abs=1e-3)


def share(n: int) -> Features:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 3
    x = torch.randn(n, 6, generator=g) + 2 * torch.eye(6)[labels]
    return Features(x, labels, torch.arange(n), torch.ones(n, dtype=torch.bool), torch.randn(n, 4, generator=g))


def test_of_many_images_a_part_is_measured_and_said(monkeypatch):
    monkeypatch.setattr(retrieval, "MOST_IMAGES", 20)
    given, asked, original = share(50), [], retrieval.measure_retrieval
    monkeypatch.setattr(retrieval, "measure_retrieval", lambda x, *more: asked.append(x) or original(x, *more))
    first, words = retrieval.both_ways(given, seed=7)
    again, _ = retrieval.both_ways(given, seed=7)
    assert "among 20 held-out images, drawn from 50" in words
    assert first == again
    assert first != retrieval.both_ways(given, seed=8)[0]
    x, z = asked[:2]
    rows = [int((given.x == row).all(1).nonzero()) for row in x]
    assert len(set(rows)) == 20
    assert torch.equal(z, given.z[rows])  # pyright: ignore[reportOptionalSubscript]


def test_features_that_are_not_finite_end_nothing():
    given = share(20)
    given.x[3, 1] = torch.inf
    values, words = retrieval.both_ways(given, seed=0)
    assert all(math.isnan(values[f"features/{name}"]) for name in retrieval.MEASURES)
    assert all(math.isfinite(values[f"head/{name}"]) for name in retrieval.MEASURES)
    assert "features: precision_at_1 nan" in words


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["red", "--retrieval-every", "1"], "--retrieval-every measures held-out images: "),
        ([".", "--retrieval-every", "-1"], "--retrieval-every must be at least 0, not -1."),
        ([".", "--retrieval-every", "1", "--val-data", "RED"], "needs class folders, two at least"),
    ],
)
def test_a_mistake_is_one_sentence(words, sentence, image_folder, tmp_path, in_process, capsys):
    folder = {"red": image_folder / "train" / "red", ".": image_folder}[words[0]]
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "red").symlink_to(image_folder / "val" / "red")
    words = [tmp_path / "val" if word == "RED" else word for word in words]
    words = [*PRETRAIN, folder, *words[1:], "--save-dir", tmp_path / "run"]
    assert sentence in one_sentence(in_process, capsys, *words)
    assert not (tmp_path / "run").exists()


def test_without_held_out_images_a_run_goes_on(image_folder, tmp_path, in_process, capsys):
    assert in_process(*TINY, "--steps", 1, "--knn-every", 1, image_folder / "train", "--save-dir", tmp_path) == 0
    assert "no k-NN accuracy: " in capsys.readouterr().out
