"""RankMe against the paper's definition by an SVD in float64, and when a pretraining measures it."""

import functools
import json
import math

import numpy as np
import pytest
import torch
from conftest import TINY, differences, load, records

from moco import distributed
from moco.data import ArraySource
from moco.eval import rankme as rankme_of
from moco.eval.features import EvalData, FeatureExtractor
from moco.eval.rankme import measure_rankme, rankme, sample
from moco.models.encoder import around_head, build_encoder

CPU = torch.device("cpu")
DRAWS = torch.Generator().manual_seed(0)


def definition(z: torch.Tensor) -> float:
    """Equation 1 of arXiv 2210.02885, in numpy."""
    sigma = np.linalg.svd(z.double().numpy(), compute_uv=False)
    p = sigma / np.abs(sigma).sum() + 1e-7
    return float(np.exp(-(p * np.log(p)).sum()))


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=DRAWS)


@pytest.mark.parametrize(
    ("z", "error"),
    [
        (drawn(500, 40), 1e-12),
        (drawn(500, 40) + 3.0, 1e-12),  # not centred: the mean is a direction of its own
        (drawn(30, 64), 1e-12),  # fewer images than channels: of 64 eigenvalues 34 are none of the definition's
        (drawn(500, 40) * torch.logspace(0, -6, 40), 1e-9),
        (drawn(500, 7) @ drawn(7, 40), 1e-4),
        (drawn(500, 1) @ drawn(1, 40), 1e-4),
    ],
    ids=["full rank", "with a mean", "few images", "decaying", "rank 7", "rank 1"],
)
def test_it_is_the_papers_definition(z, error):
    assert rankme(z, CPU) == pytest.approx(definition(z), rel=error)


def test_equal_directions_count_one_each_and_a_collapse_is_one():
    for r in (1, 3, 20):
        q = torch.linalg.qr(drawn(200, r))[0]
        z = q @ torch.linalg.qr(drawn(20, r))[0].T  # (200, 20) with r singular values of 1
        assert rankme(5.0 * z, CPU) == pytest.approx(r, rel=1e-4)
    assert rankme(torch.ones(200, 1) @ drawn(1, 20), CPU) == pytest.approx(1.0, rel=1e-4)
    assert rankme(torch.zeros(200, 20), CPU) == pytest.approx(1.0, rel=1e-4)
    assert math.isnan(rankme(torch.full((3, 4), math.nan), CPU))


def test_a_sum_in_parts_is_the_whole(monkeypatch):
    z = drawn(100, 8)
    whole = rankme(z, CPU)
    monkeypatch.setattr(rankme_of, "ROWS", 7)
    assert rankme(z, CPU) == pytest.approx(whole, rel=1e-12)


def test_of_many_images_the_same_part_is_drawn(monkeypatch):
    assert sample(10, 0).tolist() == list(range(10))
    monkeypatch.setattr(rankme_of, "MOST_IMAGES", 6)
    first = sample(100, 5)
    assert len(set(first)) == 6 and (np.diff(first) > 0).all() and first.max() < 100
    assert (sample(100, 5) == first).all() and (sample(100, 6) != first).any()


def unlabelled(n: int) -> ArraySource:
    return ArraySource("grey", np.random.default_rng(0).integers(0, 255, (n, 16, 16, 3), dtype=np.uint8))


def measured(out, args: object) -> int:
    torch.manual_seed(0)
    encoder = build_encoder("test_resnet", 5, size=16)
    extractor = FeatureExtractor(EvalData(16, 8), CPU, (0.5,) * 3, (0.2,) * 3)
    source = unlabelled(31)
    values, text = measure_rankme(encoder, source, extractor, seed=0)
    assert source.labels is None and encoder.training
    if distributed.is_main():
        out.write_text(json.dumps({"values": values, "text": text, "parts": distributed.world_size()}))
    return 0


def test_it_is_of_what_enters_the_head_and_of_what_leaves_it(tmp_path):
    measured(tmp_path / "one.json", None)
    found = json.loads((tmp_path / "one.json").read_text())
    torch.manual_seed(0)
    encoder = build_encoder("test_resnet", 5, size=16).eval()
    pixels = torch.from_numpy(unlabelled(31).images).permute(0, 3, 1, 2) / 255  # as they are: 16 px at size 16
    with torch.no_grad():
        x, z = around_head(encoder, (pixels - 0.5) / 0.2)
    assert found["values"]["rankme"] == pytest.approx(definition(x), rel=1e-4)
    assert found["values"]["rankme_head"] == pytest.approx(definition(z), rel=1e-4)
    assert f"RankMe {definition(x):.1f} of {x.shape[1]} (encoder features), " in found["text"]


@pytest.mark.dist
def test_two_processes_measure_what_one_does(tmp_path, start, alone):
    program = start("--nproc", 2, "unused", main=functools.partial(measured, tmp_path / "two.json"))
    assert program.end() == 0, program.text
    measured(tmp_path / "one.json", None)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one["parts"], two["parts"]) == (1, 2)
    assert two["values"] == pytest.approx(one["values"], rel=1e-5)


def test_a_run_without_labels_has_it_and_stays_the_same_run(image_folder, tmp_path, in_process, passes, capsys):
    images = [str(path) for path in sorted(image_folder.rglob("*.png"))][:16]
    (tmp_path / "images.txt").write_text("\n".join(images))
    for name, every in (("with", 2), ("without", 0)):
        words = [*TINY, "--epochs", 3, "--rankme-every", every, tmp_path / "images.txt"]
        assert in_process(*words, "--save-dir", tmp_path / name) == 0
    found = [record for record in records(tmp_path / "with") if "rankme" in record]
    assert [(record["epoch"], record["finished_epochs"], record["step"]) for record in found] == [(1, 2, 4), (2, 3, 6)]
    assert all(1.0 < record["rankme"] <= 16 and 1.0 < record["rankme_head"] <= 16 for record in found)
    assert passes == [16, 16]
    assert f"epoch 2: RankMe {found[1]['rankme']:.1f} of " in capsys.readouterr().out
    assert differences(load(tmp_path / "with"), load(tmp_path / "without")) == []
    assert not any("rankme" in record for record in records(tmp_path / "without"))


def test_it_follows_knn_every_and_takes_the_features_that_knn_has_read(image_folder, tmp_path, in_process, passes):
    words = [*TINY, "--epochs", 1, "--knn-every", 1, "--knn-k", 3, image_folder]
    assert in_process(*words, "--save-dir", tmp_path / "both") == 0
    assert passes == [8, 24]  # held-out images, training images
    assert in_process(*words, "--knn-every", 0, "--rankme-every", 1, "--save-dir", tmp_path / "alone") == 0
    assert passes == [8, 24, 24]
    both, alone = ([r for r in records(tmp_path / name) if "rankme" in r] for name in ("both", "alone"))
    assert len(both) == len(alone) == 1
    for name in ("rankme", "rankme_head"):
        assert both[0][name] == pytest.approx(alone[0][name], rel=1e-6)
