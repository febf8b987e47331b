"""k-NN against loops and scikit-learn; alignment and uniformity against their definitions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from moco.data import ArraySource, EpochSampler, Labelled, make_loader
from moco.encoder import build_encoder, features, head_of
from moco.knn import alignment, evaluate_knn, extract, knn_accuracy, knn_predict, uniformity

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


@pytest.mark.parametrize(("k", "T"), [(1, 0.1), (7, 0.1), (20, 0.07), (60, 1.0), (500, 0.1)])
def test_equals_loops_written_from_the_definition(k, T):
    bank, bank_labels, queries, labels = clusters(60, 40)
    expected = loops(bank, bank_labels, queries, k, T, 5)
    assert knn_predict(bank, bank_labels, queries, k=k, temperature=T, num_classes=5).tolist() == expected
    right = 100 * np.mean(np.array(expected) == labels.numpy())
    assert 20 < right < 90  # the set tells a right vote from a wrong one
    found = knn_accuracy(bank, bank_labels, queries, labels, k=k, temperature=T, num_classes=5)
    assert found == pytest.approx(right)


def test_agrees_with_scikit_learn():
    bank, bank_labels, queries, labels = clusters(400, 300, seed=1)
    peer = KNeighborsClassifier(25, weights=lambda d: np.exp((1 - d) / 0.1), metric="cosine", algorithm="brute")
    peer.fit(bank.double().numpy(), bank_labels.numpy())
    ours = knn_predict(bank, bank_labels, queries, k=25, temperature=0.1, num_classes=5)
    assert ours.tolist() == peer.predict(queries.double().numpy()).tolist()
    assert 20 < 100 * (ours == labels).float().mean() < 95


@pytest.mark.parametrize("chunk", [1, 7, 64, 333, 1 << 24])
def test_chunks_bound_the_memory_and_not_the_result(chunk):
    bank, bank_labels, queries, _ = clusters(90, 31, seed=2)
    whole = knn_predict(bank, bank_labels, queries, k=12, temperature=0.1, num_classes=5)
    parts = knn_predict(bank, bank_labels, queries, k=12, temperature=0.1, num_classes=5, chunk=chunk)
    assert parts.tolist() == whole.tolist()


def test_scale_of_the_features_and_a_tiny_temperature_do_not_matter():
    bank, bank_labels, queries, _ = clusters(50, 20, seed=3)
    arguments = {"k": 5, "temperature": 0.1, "num_classes": 5}
    scaled = knn_predict(1000 * bank, bank_labels, 0.001 * queries, **arguments)
    assert scaled.tolist() == knn_predict(bank, bank_labels, queries, **arguments).tolist()
    # exp(1 / 0.001) is no float: the vote is then the nearest neighbour's alone
    tiny = knn_predict(bank, bank_labels, queries, k=5, temperature=1e-3, num_classes=5)
    nearest = bank_labels[(F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T).argmax(1)]
    assert tiny.tolist() == nearest.tolist()


def test_equal_votes_go_to_the_lower_class():
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    found = knn_predict(
        bank, torch.tensor([2, 1]), torch.tensor([[1.0, 1.0]]), k=2, temperature=0.1, num_classes=3
    )
    assert found.tolist() == [1]


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
    loader = make_loader(Labelled(source, 16, train=False), EpochSampler(11, 4, 0, drop_last=False, shuffle=False))
    encoder.train()
    before = torch.get_rng_state()
    noted = []
    x, labels = extract(encoder, loader, CPU, (0.5,) * 3, (0.2,) * 3, note=lambda batch, s: noted.append((s, batch)))
    assert encoder.training
    assert torch.equal(before, torch.get_rng_state())
    assert labels.tolist() == source.labels.tolist()
    assert [s for s, _ in noted] == [source] * 3
    pixels = torch.stack([torch.tensor(np.asarray(source.load(i))).permute(2, 0, 1) for i in range(11)]) / 255
    with torch.no_grad():
        expected = features(encoder.eval(), (pixels - 0.5) / 0.2)
    torch.testing.assert_close(x, expected)
    out, _ = extract(encoder, loader, CPU, (0.5,) * 3, (0.2,) * 3, what="output")
    torch.testing.assert_close(out, encoder.get_submodule(head_of(encoder))(expected).detach())
    assert not encoder.training


def test_evaluation_in_one_call_is_deterministic_and_finds_the_colours():
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", 7, size=16)
    how = {"size": 16, "batch_size": 8, "device": CPU, "mean": (0.5,) * 3, "std": (0.2,) * 3, "k": 5}
    assert evaluate_knn(encoder, coloured(30, 0), coloured(13, 1), **how) == 100.0
    mixed = coloured(13, 1)
    mixed.labels = np.random.default_rng(0).integers(0, 3, 13)
    first = evaluate_knn(encoder, coloured(30, 0), mixed, **how)
    assert first == evaluate_knn(encoder, coloured(30, 0), mixed, **how) < 100
    # bf16 features differ in their last bits only, which these colours do not notice
    assert evaluate_knn(encoder, coloured(30, 0), coloured(13, 1), amp=torch.bfloat16, **how) == 100.0


def test_alignment_and_uniformity_equal_their_definitions():
    g = torch.Generator().manual_seed(0)
    q, k = (F.normalize(torch.randn(9, 5, generator=g), dim=1) for _ in range(2))
    distances = [float((a - b).norm() ** 2) for a, b in zip(q, k, strict=True)]
    assert float(alignment(q, k)) == pytest.approx(np.mean(distances), rel=1e-5)
    pairs = [math.exp(-2 * float((q[i] - q[j]).norm() ** 2)) for i in range(9) for j in range(i + 1, 9)]
    assert float(uniformity(q)) == pytest.approx(math.log(np.mean(pairs)), rel=1e-5)
    assert float(uniformity(torch.ones(4, 5) / math.sqrt(5))) == pytest.approx(0.0, abs=1e-6)  # collapsed: the maximum
    assert float(alignment(q, q)) == 0.0
