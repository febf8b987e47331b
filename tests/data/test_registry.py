"""A data set is one row and a reader: flags, shape, statistics, views and probe follow from it."""

import json
import sys
from types import ModuleType

import numpy as np
import pytest
from conftest import load

from moco.data import ArraySource, open_sources, probe_preset
from moco.data.registry import DATASETS, DataSet, channel_statistics, dataset_of
from moco.errors import UserError


def toys(directory, download, channels):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (24, 20, 20), dtype=np.uint8), np.arange(24) % 3
    source = ArraySource("toys", images, channels, ["a", "b", "c"], labels)
    return source, source, source


@pytest.fixture
def row(monkeypatch):
    module = ModuleType("toy_reader")
    module.toys = toys  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_reader", module)
    monkeypatch.setitem(DATASETS, "toys", DataSet("toy_reader:toys", (0.4,), (0.3,), 20, 1, "digits", mirrored=False))


def test_a_row_is_opened_and_trained_on(row, tmp_path, in_process):
    assert len(open_sources("toys").pretrain) == 24
    argv = ["-a", "test_resnet", "-b", 8, "--moco-k", 16, "-j", 0, "--amp", "off", "--steps", 2, "--knn-every", 1]
    assert in_process("--dataset", "toys", *argv, "--knn-k", 3, "--save-dir", tmp_path) == 0
    run = load(tmp_path)["run"]
    images = run["images"]
    assert (images["size"], images["channels"], images["mean"], images["std"]) == (20, 1, [0.4], [0.3])
    assert run["flags"]["--aug"] == "digits"
    assert any("knn" in json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert probe_preset(dataset_of("toys").mirrored).flip_p == 0


def test_a_name_without_a_row_is_one_sentence(row):
    with pytest.raises(UserError, match=r"unknown data set toyz: choose one of folder, .*, toys"):
        open_sources("toyz")
    with pytest.raises(UserError, match=r"or --dataset \(cifar10, .*, toys\)"):
        open_sources(None)
    assert channel_statistics("toys", 1) == ([0.4], [0.3])
