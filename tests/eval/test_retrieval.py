"""Retrieval and clustering metrics: the measures against definitions and a peer, the head of a file, the command."""

import functools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import save_pretrained
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN

from moco import retrieval as retrieval_door
from moco.cli import commands
from moco.errors import UserError
from moco.eval import retrieval
from moco.models.encoder import build_encoder

pytestmark = pytest.mark.usefixtures("alone")
FLAGS = ["-a", "test_resnet", "--size", "16", "-b", "8", "-j", "0"]


def blobs(sizes: list[int], spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    centres = torch.randn(len(sizes), 12, generator=g)
    x = centres[labels] + spread * torch.randn(len(labels), 12, generator=g)
    shuffled = torch.randperm(len(x), generator=g)
    return (x * torch.rand(len(x), 1, generator=g).add(0.1))[shuffled], labels[shuffled]  # lengths do not count


def by_definition(x: np.ndarray, labels: np.ndarray) -> list[float]:
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    found = []
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        R = sum(labels[j] == labels[i] for j in others)
        if R:
            order = sorted(others, key=lambda j: -float(x[i] @ x[j]))
            right = [labels[j] == labels[i] for j in order]
            terms = [right[p] * sum(right[: p + 1]) / (p + 1) for p in range(len(order))]
            found.append((right[0], sum(right[:R]) / R, sum(terms[:R]) / R, sum(terms) / R))
    return list(100 * np.mean(np.array(found, dtype=float), axis=0))


@pytest.mark.parametrize("spread", [0.3, 1.5])
@pytest.mark.parametrize("chunk", [1, 100, 1 << 24])
def test_rankings_are_their_definition_in_parts_of_any_size(spread, chunk, monkeypatch):
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    x, labels = blobs([9, 1, 5, 2, 20], spread)  # one image is alone in its class
    found = retrieval.measure_retrieval(x.double(), labels, seed=0)
    assert list(found.values())[:4] == pytest.approx(by_definition(x.double().numpy(), labels.numpy()), abs=1e-9)


def test_all_measures_are_those_of_pytorch_metric_learning():
    x, labels = blobs([9, 1, 5, 2, 20, 30], 1.0)
    names = {"precision_at_1": "precision_at_1", "r_precision": "r_precision", "map": "mean_average_precision",
             "map_at_r": "mean_average_precision_at_r", "ami": "AMI", "nmi": "NMI"}  # fmt: skip
    peer = AccuracyCalculator(
        include=tuple(names.values()), k=len(x) - 1, device=torch.device("cpu"),
        knn_func=CustomKNN(CosineSimilarity()),
        kmeans_func=lambda x, k: torch.from_numpy(retrieval.kmeans(x, k, seed=0)),
    )  # fmt: skip
    found, theirs = retrieval.measure_retrieval(x, labels, seed=0), peer.get_accuracy(F.normalize(x, dim=1), labels)
    assert found == pytest.approx({name: 100 * theirs[their] for name, their in names.items()}, abs=1e-3)
    assert tuple(found) == retrieval.MEASURES
    assert 20 < found["map_at_r"] < found["map"] < 99
    assert found["map_at_r"] < found["r_precision"] < 99


def test_separate_classes_are_found_and_grouped_wholly():
    x, labels = blobs([8, 8, 8], 1e-3)
    assert list(retrieval.measure_retrieval(x, labels, seed=0).values()) == pytest.approx([100.0] * 6)


def test_a_collapsed_encoder_groups_nothing_and_warns_of_nothing():
    found = retrieval.measure_retrieval(torch.ones(12, 4), torch.arange(12) % 3, seed=0)
    assert found["ami"] == pytest.approx(0.0, abs=1e-9)


@pytest.fixture(scope="module", params=["linear", "mlp"])
def pretrained(request, tmp_path_factory):
    torch.manual_seed(0)
    encoder = build_encoder("test_resnet", 16, size=16, mlp=request.param == "mlp").eval()
    return save_pretrained(tmp_path_factory.mktemp("pretrained") / "checkpoint_0001.pth.tar", encoder), encoder


def test_the_head_of_a_file_is_the_encoders_own(pretrained):
    path, encoder = pretrained
    images = torch.rand(5, 3, 16, 16)
    caught = []
    encoder.get_submodule(encoder.head_name).register_forward_pre_hook(lambda module, x: caught.append(x[0]))
    with torch.no_grad():
        expected = encoder(images)
        head = retrieval.read_head(build_encoder("test_resnet", 2, size=16), str(path))
        assert head is not None
        torch.testing.assert_close(head(caught[0]), expected)


def test_a_head_with_batchnorm_is_left_out(tmp_path):
    encoder = build_encoder("test_resnet", 16, size=16)
    width = encoder.get_submodule(encoder.head_name).in_features
    entries = {f"module.encoder_q.{n}": v for n, v in encoder.state_dict().items() if not n.startswith("fc.")}
    head = torch.nn.Sequential(torch.nn.Linear(width, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
    entries |= {f"module.encoder_q.fc.{n}": v for n, v in head.state_dict().items()}
    torch.save({"state_dict": entries}, tmp_path / "c.pth")
    assert retrieval.read_head(build_encoder("test_resnet", 2, size=16), str(tmp_path / "c.pth")) is None


def test_a_head_of_no_use_is_a_sentence(pretrained, tmp_path):
    state = torch.load(pretrained[0], weights_only=True)
    name = next(name for name in state["state_dict"] if ".fc." in name)
    state["state_dict"][name] = state["state_dict"][name].long()
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"c.pth cannot be used: fc.(0\.)?weight holds int64 numbers"):
        retrieval.read_head(build_encoder("test_resnet", 2, size=16), str(tmp_path / "c.pth"))


@pytest.fixture(scope="module")
def listed(image_folder, tmp_path_factory):
    """The 24 images with classes that their colours do not tell."""
    path = tmp_path_factory.mktemp("list") / "images.txt"
    images = sorted((image_folder / "train").glob("*/*.png"))
    path.write_text("".join(f"{image}\t{'abc'[i % 3]}\n" for i, image in enumerate(images)))
    return str(path)


def test_the_command_measures_before_and_behind_the_head(pretrained, listed, tmp_path, capsys):
    words = [str(pretrained[0]), *FLAGS, listed, "--out", str(tmp_path)]
    assert retrieval_door.main(words) == 0
    found = json.loads((tmp_path / "retrieval.json").read_text())
    assert found["images"] == 24
    assert tuple(found["features"]) == tuple(found["head"]) == retrieval.MEASURES
    assert found["features"]["r_precision"] != found["head"]["r_precision"]
    assert 0 < found["features"]["map_at_r"] < 60  # a third of the images is of a query's class
    assert " * features: precision_at_1" in capsys.readouterr().out


def measured(words: list[str], args: object) -> int:
    return retrieval.retrieval_worker(commands.parse_retrieval(words))


@pytest.mark.dist
@pytest.mark.parametrize("pretrained", ["mlp"], indirect=True)
def test_two_processes_find_what_one_does(pretrained, listed, tmp_path, start):
    words = [str(pretrained[0]), *FLAGS, listed, "--out", str(tmp_path)]
    program = start("--nproc", 2, "unused", main=functools.partial(measured, words))
    assert program.end() == 0, program.text
    two = json.loads((tmp_path / "retrieval.json").read_text())
    assert retrieval_door.main(words) == 0
    one = json.loads((tmp_path / "retrieval.json").read_text())
    for where in ("features", "head"):
        assert two[where] == pytest.approx(one[where], abs=1e-3)


def test_images_without_classes_cost_a_sentence(pretrained, image_folder, tmp_path, capsys):
    flat = image_folder / "train" / "red"
    assert retrieval_door.main([str(pretrained[0]), *FLAGS, str(flat), "--out", str(tmp_path)]) == 2
    assert "needs class folders" in capsys.readouterr().err
    assert not (tmp_path / "retrieval.json").exists()
