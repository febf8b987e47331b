"""k-NN against loops and scikit-learn; alignment and uniformity against their definitions."""

import functools
import json
import math

import conftest
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import rounding
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from support.confusions import read_confusion
from torch import nn

import main_lincls
from moco import distributed
from moco.cli import parse_lincls
from moco.data import ArraySource, BadImageError
from moco.errors import UserError
from moco.eval import features as extraction
from moco.eval import knn
from moco.eval.details import Details
from moco.eval.features import EvalData, FeatureExtractor, Features
from moco.eval.knn import evaluate_knn, knn_predict, measure_knn
from moco.models.encoder import build_encoder, features, head_of
from moco.train.metrics import alignment, uniformity

CPU = torch.device("cpu")


def clusters(n: int, m: int, F_width: int = 6, classes: int = 5, seed: int = 0) -> tuple:
    """Overlapping classes: no method gets all of them right."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, F_width, generator=g)
    labels = torch.randint(classes, (n + m,), generator=g)
    x = centres[labels] + 1.5 * torch.randn(n + m, F_width, generator=g)
    return x[:n], labels[:n], x[n:], labels[n:]


def loops(bank: torch.Tensor, bank_labels: torch.Tensor, queries: torch.Tensor, k: int, T: float, C: int) -> list[int]:
    found = []
    for q in queries.double():
        s = [float(q @ b / (q.norm() * b.norm())) for b in bank.double()]
        nearest = sorted(range(len(s)), key=lambda j: -s[j])[:k]
        votes = [0.0] * C
        for j in nearest:
            votes[int(bank_labels[j])] += math.exp(s[j] / T)
        found.append(votes.index(max(votes)))
    return found


def bank_of(x, labels, ids=None) -> Features:
    ids = torch.arange(len(x)) if ids is None else ids
    return Features(x, labels, ids, torch.ones(len(x), dtype=torch.bool))


def predict(bank, bank_labels, queries, k=5, T=0.1, C=5, ids=None, **more) -> list[int]:
    bank = bank_of(bank, bank_labels, ids)
    return knn_predict(bank, queries, k=[k], temperature=T, num_classes=C, **more)[0].tolist()


@pytest.mark.parametrize(("k", "T"), [(1, 0.1), (7, 0.1), (20, 0.07), (60, 1.0), (500, 0.1)])
def test_equals_loops_written_from_the_definition(k, T):
    bank, bank_labels, queries, labels = clusters(60, 40)
    expected = loops(bank, bank_labels, queries, k, T, 5)
    assert predict(bank, bank_labels, queries, k, T) == expected
    right = 100 * np.mean(np.array(expected) == labels.numpy())
    assert 20 < right < 90  # the set tells a right vote from a wrong one


def test_agrees_with_scikit_learn():
    bank, bank_labels, queries, labels = clusters(400, 300, seed=1)
    peer = KNeighborsClassifier(25, weights=lambda d: np.exp((1 - d) / 0.1), metric="cosine", algorithm="brute")
    peer.fit(bank.double().numpy(), bank_labels.numpy())
    ours = predict(bank, bank_labels, queries, 25)
    assert ours == peer.predict(queries.double().numpy()).tolist()
    assert 20 < 100 * np.mean(np.array(ours) == labels.numpy()) < 95


def test_several_k_in_one_pass_are_those_of_one_pass_each():
    bank, bank_labels, queries, _ = clusters(120, 70, seed=5)
    ks = [20, 1, 500, 7, 20]  # neither sorted nor unique, one above the bank
    found = knn_predict(bank_of(bank, bank_labels), queries, k=ks, temperature=0.07, num_classes=5)
    assert found.tolist() == [predict(bank, bank_labels, queries, k, 0.07) for k in ks]
    assert found[1].tolist() != found[3].tolist()


@pytest.fixture
def small_parts(monkeypatch):
    """Parts that divide neither the bank nor the queries."""
    monkeypatch.setattr(knn, "BANK_ROWS", 13)
    monkeypatch.setattr(knn, "QUERY_ROWS", 11)


@pytest.mark.parametrize("chunk", [1, 7, 64, 333, 1 << 24])
@pytest.mark.parametrize("k", [1, 12, 40, 200])
def test_chunks_bound_the_memory_and_not_the_result(chunk, k, request, monkeypatch):
    bank, bank_labels, queries, _ = clusters(90, 31, seed=2)
    whole = predict(bank, bank_labels, queries, k)
    request.getfixturevalue("small_parts")
    monkeypatch.setattr(knn, "SIMILARITIES", chunk)
    assert predict(bank, bank_labels, queries, k) == whole == loops(bank, bank_labels, queries, k, 0.1, 5)


def signs(n: int, width: int, seed: int) -> torch.Tensor:
    """Rows of +-1 of a width that is a power of 4: similarities are exact and mostly equal to others."""
    return torch.randint(2, (n, width), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


@pytest.mark.parametrize("chunk", [1, 29, 1 << 24])
@pytest.mark.parametrize("k", [1, 3, 10, 50])
def test_of_equally_similar_images_the_first_vote_however_the_bank_is_cut(chunk, k, small_parts, monkeypatch):
    monkeypatch.setattr(knn, "SIMILARITIES", chunk)
    bank, queries = signs(70, 4, 0), signs(40, 4, 1)
    labels = torch.randint(5, (70,), generator=torch.Generator().manual_seed(2))
    # The loops sort stably, so that of equals they also take the first.
    first = predict(bank, labels, queries, k, T=1.0)
    assert first == loops(bank, labels, queries, k, 1.0, 5)
    last = predict(bank.flip(0), labels.flip(0), queries, k, T=1.0)
    assert last != first  # the choice among equals matters here


@pytest.mark.parametrize("k", [1, 4, 30, 100])
def test_leave_one_out_is_every_image_against_a_bank_without_it(k, small_parts):
    for bank in (clusters(60, 0, seed=4)[0], signs(60, 4, 3)):  # the second holds images many times over
        labels = torch.randint(5, (60,), generator=torch.Generator().manual_seed(1))
        expected = []
        for i in range(60):
            others = [j for j in range(60) if j != i]
            expected += loops(bank[others], labels[others], bank[i : i + 1], k, 0.1, 5)
        own = torch.arange(60)
        assert predict(bank, labels, bank, k, own=own) == expected
        # numbers with gaps, as after unreadable images
        assert predict(bank, labels, bank, k, ids=3 * own + 1, own=3 * own + 1) == expected
        assert predict(bank, labels, bank, k) != expected


def test_scale_of_the_features_and_a_tiny_temperature_do_not_matter():
    bank, bank_labels, queries, _ = clusters(50, 20, seed=3)
    assert predict(1000 * bank, bank_labels, 0.001 * queries) == predict(bank, bank_labels, queries)
    # exp(1 / 0.001) is no float: the vote is then the nearest neighbour's alone
    nearest = bank_labels[(F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T).argmax(1)]
    assert predict(bank, bank_labels, queries, T=1e-3) == nearest.tolist()


def test_equal_votes_go_to_the_lower_class():
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert predict(bank, torch.tensor([2, 1]), torch.tensor([[1.0, 1.0]]), k=2) == [1]


def coloured(n: int, seed: int) -> ArraySource:
    """Three classes, each a colour under noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = rng.integers(0, 100, (n, 16, 16, 3), dtype=np.uint8)
    images[np.arange(n), :, :, labels] += 120
    return ArraySource("coloured", images, classes=["red", "green", "blue"], labels=labels)


def test_extraction_keeps_the_order_the_mode_and_the_random_state():
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", 7, size=16)
    source = coloured(11, 0)
    encoder.train()
    before = torch.get_rng_state()
    noted = []
    extractor = reading(batch=4, note=lambda batch, s: noted.append((s, batch)))
    found = extractor.whole(encoder, source, head=True)
    assert encoder.training
    assert torch.equal(before, torch.get_rng_state())
    assert found.labels.tolist() == source.labels.tolist()
    assert [s for s, _ in noted] == [source] * 3
    pixels = torch.stack([torch.tensor(np.asarray(source.load(i))).permute(2, 0, 1) for i in range(11)]) / 255
    with torch.no_grad():
        expected = features(encoder.eval(), (pixels - 0.5) / 0.2)
    torch.testing.assert_close(found.x, expected)
    assert torch.equal(extractor.whole(encoder, source).x, found.x)
    torch.testing.assert_close(found.z, encoder.get_submodule(head_of(encoder))(expected).detach())
    assert not encoder.training


def reading(batch: int = 8, amp: torch.dtype | None = None, note=None) -> FeatureExtractor:
    return FeatureExtractor(EvalData(16, batch, note=note), CPU, (0.5,) * 3, (0.2,) * 3, amp)


def test_evaluation_in_one_call_is_deterministic_and_finds_the_colours():
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", 7, size=16)
    sets = coloured(30, 0), coloured(13, 1)
    assert evaluate_knn(encoder, *sets, reading(), k=[5, 3]) == {5: 100.0, 3: 100.0}
    mixed = coloured(13, 1)
    mixed.labels = np.random.default_rng(0).integers(0, 3, 13)
    first = evaluate_knn(encoder, sets[0], mixed, reading(), k=[5])
    assert first == evaluate_knn(encoder, sets[0], mixed, reading(), k=[5])
    assert 0 < first[5] < 100
    # bf16 features differ in their last bits only, which these colours do not notice
    assert evaluate_knn(encoder, *sets, reading(amp=torch.bfloat16), k=[5]) == {5: 100.0}


class Damaged(ArraySource):
    """Images 2 and 7 cannot be read."""

    def load(self, index):
        if index in (2, 7):
            raise BadImageError("damaged")
        return super().load(index)


def test_unreadable_images_neither_vote_nor_count():
    """One set, leave-one-out: equal to the definition on the images that can be read."""
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", 7, size=16)
    rng = np.random.default_rng(3)
    images, labels = rng.integers(0, 256, (19, 16, 16, 3), dtype=np.uint8), rng.integers(0, 2, 19)
    source = Damaged("noise", images, classes=["a", "b"], labels=labels)
    share = reading().shard(encoder, source)
    assert share.ids.tolist() == [i for i in range(19) if i not in (2, 7)]
    whole = reading().whole(encoder, source)
    assert share.z is whole.z is None
    assert all(torch.equal(getattr(share, name), getattr(whole, name)) for name in ("x", "labels", "ids"))
    votes = []
    for i in range(17):
        rest = [j for j in range(17) if j != i]
        votes += loops(share.x[rest], share.labels[rest], share.x[i : i + 1], 5, 0.1, 2)
    expected = 100 * np.mean(np.array(votes) == labels[share.ids])
    assert evaluate_knn(encoder, source, source, reading(), k=[5])[5] == pytest.approx(expected)
    noted = []
    extractor = reading(note=lambda batch, source: noted.append(batch["bad"]))
    values, asked, words = measure_knn(encoder, source, source, extractor, [5], 0.1)
    assert values["knn"] == pytest.approx(expected)
    assert (asked["val_images"], asked["unreadable"]) == (17, 2)
    assert words.endswith("; 2 of 19 images cannot be read and are not counted")
    assert {*torch.cat(noted).tolist()} == {-1, 2, 7}  # other notes see them too


def test_one_image_has_no_neighbour():
    source = coloured(1, 0)
    with pytest.raises(UserError, match="holds one image, which has no neighbour"):
        evaluate_knn(nn.Identity(), source, source, reading())


def measured(folder, args) -> None:
    """k-NN of one process or of this one among two: its lines go to a file of its own."""
    if distributed.world_size() > 1:
        extraction.GATHERED_ROWS = 5
    torch.manual_seed(0)
    encoder = build_encoder("test_resnet", 7, size=16)
    rng = np.random.default_rng(5)
    noise = rng.integers(0, 256, (23, 16, 16, 3), dtype=np.uint8)
    noise[5:9] = noise[0]  # equals, whose order must not depend on who holds them
    train = Damaged("noise", noise, classes=["a", "b", "c"], labels=rng.integers(0, 3, 23))
    val = ArraySource("val", noise[::-1][:13].copy(), classes=["a", "b", "c"], labels=rng.integers(0, 3, 13))
    extractor = reading(batch=6)
    found = [evaluate_knn(encoder, train, other, extractor, k=[1, 3, 40]) for other in (val, train)]
    told = []
    asked = Details(["a", "b", "c"], None, f"{folder}/{distributed.world_size()}", told.append)
    found.append(measure_knn(encoder, val, train, extractor, [1, 3], 0.1, asked))
    assert len(told) == distributed.is_main()
    sizes = len(extractor.shard(encoder, train).x)
    rank, whole = distributed.rank(), extractor.whole(encoder, train)
    kept = extractor.whole(encoder, train, unread=True)
    result = {"found": found, "rows": sizes, "ids": whole.ids.tolist(), "x": whole.x,
              "kept": kept.x, "readable": kept.readable.tolist()}  # fmt: skip
    torch.save(result, f"{folder}/{distributed.world_size()}_{rank}")


@pytest.mark.dist
def test_two_processes_that_share_the_bank_equal_one(tmp_path, start, small_parts):
    program = start("--nproc", 2, "unused", main=functools.partial(measured, str(tmp_path)))
    measured(str(tmp_path), None)
    assert program.end() == 0, program.text
    one, *two = (torch.load(tmp_path / name) for name in ("1_0", "2_0", "2_1"))
    matrices = [read_confusion((tmp_path / n / "knn_confusion.csv").read_text()) for n in ("1", "2")]
    assert matrices[0][0].tolist() == matrices[1][0].tolist()
    assert 100 * matrices[0][0].trace() / 21 == pytest.approx(one["found"][2][0]["knn"])
    assert two[0]["rows"] + two[1]["rows"] == one["rows"] == 21  # neither holds the bank
    assert one["found"][0] != one["found"][1]
    for other in two:
        assert other["found"] == one["found"]
        assert other["ids"] == one["ids"]
        torch.testing.assert_close(other["x"], one["x"])
        torch.testing.assert_close(other["kept"], one["kept"])
        assert other["readable"] == [i not in (2, 7) for i in range(23)]


def test_alignment_and_uniformity_equal_their_definitions():
    g = torch.Generator().manual_seed(0)
    q, k = (F.normalize(torch.randn(9, 5, generator=g), dim=1) for _ in range(2))
    distances = [float((a - b).norm() ** 2) for a, b in zip(q, k, strict=True)]
    assert float(alignment(q, k)) == pytest.approx(np.mean(distances), rel=1e-5)
    pairs = [math.exp(-2 * float((q[i] - q[j]).norm() ** 2)) for i in range(9) for j in range(i + 1, 9)]
    assert float(uniformity(q)) == pytest.approx(math.log(np.mean(pairs)), rel=1e-5)
    collapsed = float(uniformity(torch.ones(4, 5) / math.sqrt(5)))  # the maximum
    assert collapsed == pytest.approx(0.0, abs=rounding(5 + 6 + 2))
    assert float(alignment(q, q)) == 0.0


# ------------------------------------------------------------------------------------------------- the programs


TINY = ["-a", "test_resnet", "--size", "16", "-b", "8", "-j", "0", "--seed", "3"]


def knn_json(save_dir, *words) -> dict:
    args = parse_lincls([*TINY, "--knn", "--save-dir", str(save_dir), *map(str, words)])
    assert main_lincls.worker(args) == 0
    return json.loads((save_dir / "knn.json").read_text())


def test_several_k_and_one_set_alone_from_the_command_line(image_folder, tmp_path, capsys):
    several = knn_json(tmp_path, "--knn-k", 7, 40, 1, "--knn-t", 0.07, image_folder)
    ones = [knn_json(tmp_path, "--knn-k", k, "--knn-t", 0.07, image_folder)["knn"] for k in (7, 40, 1)]
    assert [several[f"knn_{k}"] for k in (7, 40, 1)] == ones
    assert (several["knn"], several["k"], several["T"], several["leave_one_out"]) == (ones[0], 7, 0.07, False)
    alone = knn_json(tmp_path, "--knn-k", 40, image_folder / "train")  # class folders without held-out images
    assert (alone["leave_one_out"], alone["k"]) == (True, 40)
    assert "knn_40" not in alone
    words = capsys.readouterr().out.splitlines()
    assert words[-1].endswith("(k=40, T=0.1, cosine, encoder features, each image against the others)")
    assert any("(k=7/40/1, T=0.07, cosine, encoder features)" in line for line in words)


def test_unlabelled_images_have_no_neighbours_that_vote(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(UserError, match="has no labels: neighbours vote for classes"):
        knn_json(tmp_path, tmp_path)


def test_pretraining_logs_every_k(image_folder, tmp_path, in_process, capsys):
    words = [*conftest.TINY, "--steps", 1, "--knn-every", 1, "--knn-k", 5, 3, image_folder, "--save-dir", tmp_path]
    assert in_process(*words) == 0
    (record,) = [r for r in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()) if "knn" in r]
    assert record["knn"] == record["knn_5"]
    assert "knn_3" in record
    assert "% (k=5), " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "ks", "schedule"),
    [
        (["--knn-k", "10", "20", "DIR"], [10, 20], [60, 80]),
        (["--knn-k", "10", "DIR", "--schedule", "1", "2"], [10], [1, 2]),
        (["DIR", "--schedule", "1", "--knn-k", "10", "20"], [10, 20], [1]),
        (["--schedule", "1", "2", "--knn-k", "10", "DIR"], [10], [1, 2]),
        (["--schedule", "--knn-k", "10", "DIR", "-p", "3"], [10], []),
        (["--knn-k=10", "DIR"], [10], [60, 80]),
        (["--mean", "-0.5", ".5", ".5", "--knn-k", "1", "DIR"], [1], [60, 80]),
    ],
)
def test_a_list_of_numbers_ends_before_the_folder(words, ks, schedule):
    args = parse_lincls(words)
    assert (args.data, args.knn_k, args.schedule) == ("DIR", ks, schedule)


@pytest.mark.parametrize("words", [["--knn-k", "10", "0"], ["--knn-k", "x"], ["--knn-k"]])
def test_what_is_no_number_of_neighbours_is_one_sentence(words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_lincls(["DIR", *words])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--knn-k" in line


def test_the_variants_of_the_benchmark_agree(script):
    bench = script("speed.knn")
    one, other = (bench.measure(name, 500, 40, 16, 20) for name in bench.VARIANTS)
    assert one["classes"] == other["classes"]
