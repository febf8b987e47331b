"""Few-shot accuracy against a loop written from the protocol; split files; and each mistake's sentence."""

import functools
import json

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize

import main_lincls
from moco.cli import parse_lincls
from moco.config import FewShotConfig
from moco.data import ArraySource, FileSource, Sources, open_sources
from moco.errors import UserError
from moco.eval import fewshot
from moco.eval.fewshot import episode, few_shot, interval95, leak, pool
from moco.models.encoder import build_encoder

TINY = ["-a", "test_resnet", "--size", "16", "-b", "8", "-j", "0", "--seed", "3"]
FEW = ["--few-shot", "--few-shot-way", "2", "--few-shot-queries", "2", "--few-shot-shots", "1", "2"]
FEW += ["--few-shot-episodes", "10"]


def sets(classes: int, each: int, width: int, spread: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Features around one centre a class, at a distance of about 1 from each other."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(classes), each))
    centres = rng.standard_normal((classes, width)) / np.sqrt(2 * width)
    x = centres[labels] + spread * rng.standard_normal((len(labels), width)) / np.sqrt(width)
    return x.astype(np.float32), labels, [f"c{i}" for i in range(classes)]


# ---------------------------------------------------------------------------------------------------- the protocol


def test_equals_a_loop_written_from_the_protocol():
    """Same episodes; everything after the draw is done one image at a time."""
    x, labels, names = sets(8, 12, 16, 2.0)
    setting = FewShotConfig(way=4, shots=(3, 1), queries=5, episodes=12, seed=7)
    found = few_shot(x, labels, names, setting)
    by_class = [np.flatnonzero(labels == c) for c in range(8)]
    for shot in (1, 3):
        expected = []
        for number in range(12):
            queries, support = episode(by_class, setting, number)
            known, asked = [], []
            for way in range(4):
                known += [(normalize(x[i : i + 1])[0], labels[i]) for i in support[way][:shot]]
                asked += [(normalize(x[i : i + 1])[0], labels[i]) for i in queries[way]]
            model = LogisticRegression(C=1, solver="lbfgs", max_iter=1000)
            model.fit([v for v, _ in known], [c for _, c in known])
            expected.append(100 * np.mean([model.predict([v])[0] == c for v, c in asked]))
        assert found[shot].tolist() == pytest.approx(expected)
        assert 25 < np.mean(expected) < 95
    assert found[3].mean() > found[1].mean()


def test_separable_features_give_100_percent_and_noise_gives_chance():
    setting = FewShotConfig(episodes=40)
    apart = few_shot(*sets(8, 20, 64, 0.01), setting)
    assert [float(a.mean()) for a in apart.values()] == [100.0, 100.0]
    assert interval95(apart[1]) == 0.0
    # From few images chance would be missed: episodes that share images err alike, which the interval cannot see.
    x, labels, names = sets(8, 1000, 32, 1.0)
    noise = few_shot(np.random.default_rng(1).standard_normal(x.shape), labels, names, FewShotConfig(episodes=150))
    for accuracies in noise.values():
        assert abs(accuracies.mean() - 20) < interval95(accuracies)
        assert 0.3 < interval95(accuracies) < 2


def test_the_interval_covers_the_truth_19_times_in_20():
    """On means that are known; and as written: 1.96 s / sqrt(E)."""
    rng = np.random.default_rng(0)
    draws = rng.normal(50, 9, (4000, 600))
    covered = [abs(row.mean() - 50) < interval95(row) for row in draws]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)
    assert interval95(np.array([1.0, 3.0])) == pytest.approx(1.96 * np.sqrt(2) / np.sqrt(2))


def test_an_episode_is_a_function_of_seed_and_number():
    _, labels, _ = sets(8, 25, 4, 1.0)
    by_class = [np.flatnonzero(labels == c) for c in range(8)]
    setting = FewShotConfig(seed=4)
    drawn = [episode(by_class, setting, number) for number in range(300)]
    for queries, support in drawn:
        assert queries.shape == (5, 15) and support.shape == (5, 5)
        used = np.concatenate([queries, support], 1)
        assert len(set(used.ravel())) == 100  # no image twice
        of = labels[used]
        assert (of == of[:, :1]).all() and len(set(of[:, 0])) == 5  # a class a row, five classes
    again = episode(by_class, setting, 17)
    assert all(np.array_equal(a, b) for a, b in zip(again, drawn[17], strict=True))
    fewer = episode(by_class, FewShotConfig(seed=4, shots=(1,)), 17)
    assert np.array_equal(fewer[0], again[0]) and np.array_equal(fewer[1], again[1][:, :1])
    other = episode(by_class, FewShotConfig(seed=5), 17)
    assert not np.array_equal(other[0], again[0])
    counts = np.bincount(np.concatenate([labels[q[:, 0]] for q, _ in drawn]))
    assert counts.sum() == 1500 and counts.min() > 130  # every class gets its turns
    images = np.bincount(np.concatenate([q.ravel() for q, _ in drawn]), minlength=200)
    assert images.min() > 60  # of 112 expected


# -------------------------------------------------------------------------------------------------- which images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four classes with 5 images in train and 4 in val, their names unique."""
    return write_images(
        tmp_path_factory.mktemp("few"), {"train": 5, "val": 4}, [f"n0000000{label}" for label in range(4)],
        lambda rng, label: rng.integers(0, 120, (16, 16, 3)) + 40 * label, name="{split}_{label}_{i}.png",
    )  # fmt: skip


def names(source) -> list[str]:
    return [source.name_of(i).rsplit("/", 1)[-1] for i in range(len(source))]


def test_without_a_file_held_out_images_are_drawn(folder):
    sources = open_sources(path=str(folder))
    assert pool(sources) is sources.val
    one = open_sources(path=str(folder / "train"))
    assert pool(one) is one.pretrain


def test_a_class_list_takes_training_and_held_out_images(folder, tmp_path):
    file = tmp_path / "test.txt"
    file.write_text("n00000003\n\nn00000001\nn00000003\n")
    picked = pool(open_sources(path=str(folder)), str(file))
    assert picked.classes == ["n00000003", "n00000001"]
    expected = [f"{s}_{c}_{i}.png" for s, n in (("train", 5), ("val", 4)) for c in (1, 3) for i in range(n)]
    assert sorted(names(picked)) == sorted(expected)
    for i, name in enumerate(names(picked)):
        assert picked.classes[picked.labels[i]] == f"n0000000{name.split('_')[1]}"
        with Image.open(picked.name_of(i)) as image:
            assert np.array_equal(np.asarray(picked.load(i)), np.asarray(image))


def test_a_class_list_for_images_in_memory():
    """CIFAR-FS: classes of CIFAR-100, all their 600 images."""
    grey = np.arange(12, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    kinds = ["apple", "maple_tree", "bee"]
    train, val = (ArraySource(n, grey[a:b], classes=kinds, labels=np.arange(b - a) % 3) for n, a, b in
                  (("train", 0, 9), ("val", 9, 12)))  # fmt: skip
    picked = fewshot._by_class([train, val], ["bee", "apple"], "list")
    assert [int(np.asarray(picked.load(i))[0, 0]) for i in range(len(picked))] == [0, 2, 3, 5, 6, 8, 9, 11]
    assert picked.labels.tolist() == [1, 0, 1, 0, 1, 0, 1, 0]
    assert picked.native_size == 8 and picked.channels == 1


def test_mini_imagenets_csv_finds_its_images_in_a_flat_folder(folder, tmp_path):
    flat = tmp_path / "images"
    flat.mkdir()
    for path in folder.rglob("*.png"):
        (flat / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "test.csv"
    rows = [(f"train_{c}_{i}.png", f"n0000000{c}") for c in (2, 0) for i in range(3)]
    file.write_text("filename,label\n" + "".join(f"{a},{b}\n" for a, b in rows))
    picked = pool(open_sources(path=str(tmp_path)), str(file))
    assert picked.classes == ["n00000000", "n00000002"]
    assert [(n, picked.classes[k]) for n, k in zip(names(picked), picked.labels, strict=True)] == rows
    assert names(pool(open_sources(path=str(folder)), str(file))) == names(picked)  # class folders do as well


def test_image_nets_classes_are_told():
    assert "pretrained on ImageNet has seen" in leak(["bee", "n01532829"])
    assert leak(["bee", "n1", "n015328290"]) == ""


# --------------------------------------------------------------------------------------------------- the program


def test_the_program_writes_what_the_functions_find(folder, tmp_path, capsys):
    words = [*TINY, *FEW, "--few-shot-shots", "1", "2", str(folder), "--save-dir", str(tmp_path)]
    args = parse_lincls(words)
    assert main_lincls.worker(args) == 0
    found = json.loads((tmp_path / "few_shot.json").read_text())
    assert (found["mode"], found["way"], found["shots"], found["queries"], found["episodes"]) == (
        "few_shot", 2, [1, 2], 2, 10,
    )  # fmt: skip
    assert "ImageNet" in found["warning"]
    assert (found["train_images"], found["val_images"], found["unreadable"]) == (16, 16, 0)  # one set, both times
    assert 50 < found["acc_1shot"] <= 100 and 0 <= found["ci95_2shot"] < 50
    out = capsys.readouterr().out.splitlines()
    assert out[2].startswith("16 images, from which episodes are drawn, 4 classes")
    assert out[-1] == (
        f" * 2-way 2-shot {found['acc_2shot']:.2f} +- {found['ci95_2shot']:.2f} (10 episodes, 2 queries a class, "
        "encoder features)"
    )
    assert any(line.startswith("warning: these classes are ImageNet's") for line in out)
    (record,) = map(json.loads, (tmp_path / "few_shot.jsonl").read_text().splitlines())
    assert record["acc_1shot"] == found["acc_1shot"]
    assert main_lincls.worker(args) == 0  # the same seed, the same episodes
    assert json.loads((tmp_path / "few_shot.json").read_text()) == found


def both(folder: str, save_dir: str, args) -> None:
    torch.manual_seed(0)
    words = [*TINY, *FEW, folder, "--save-dir", save_dir]
    main_lincls.worker(parse_lincls(words))


@pytest.mark.dist
def test_two_processes_share_the_episodes(folder, tmp_path, start):
    program = start("--nproc", 2, "unused", main=functools.partial(both, str(folder), str(tmp_path / "two")))
    both(str(folder), str(tmp_path / "one"), None)
    assert program.end() == 0, program.text
    one, two = (json.loads((tmp_path / n / "few_shot.json").read_text()) for n in ("one", "two"))
    assert one == two


# ---------------------------------------------------------------------------------------------------- mistakes


def test_too_few_images_or_classes_are_one_sentence():
    x, labels, kinds = sets(5, 20, 4, 1.0)
    few_shot(x, labels, kinds, FewShotConfig(episodes=2))
    drop = np.flatnonzero(labels == 4)[0]
    with pytest.raises(UserError, match="class c4 has 19 images, and 5 shots with 15 queries take 20; lower"):
        few_shot(np.delete(x, drop, 0), np.delete(labels, drop), kinds, FewShotConfig(episodes=2))
    with pytest.raises(UserError, match="5 classes are fewer than --few-shot-way 6"):
        few_shot(x, labels, kinds, FewShotConfig(way=6, episodes=2))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("n00000001\nbee\nwasp\n", "names the class bee and 1 more, which .* lacks"),
        ("filename,label\n", "needs a file name and a label"),
        ("filename,label\nx.png\n", "needs a file name and a label"),
        ("filename,label\ntrain_0_0.png,a\nx.png,a\n", "names the image x.png, which .* lacks"),
        (b"\xff\xfe\x00", "neither a list of classes nor a CSV"),
        (b"\xff\xfe\n", "names the class"),
        ('"' + "x" * 200_000, "neither a list of classes nor a CSV"),
        (None, "cannot be read"),
    ],
)
def test_each_split_file_that_cannot_be_used_has_its_sentence(text, sentence, folder, tmp_path):
    file = tmp_path / "split"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=sentence):
        pool(open_sources(path=str(folder)), str(file))


def test_data_that_does_not_suit_the_file_has_its_sentence(folder, tmp_path):
    flat = Sources(FileSource("flat", [str(folder / "a" / "x.png"), str(folder / "b" / "x.png")]))
    csv, listing = tmp_path / "a.csv", tmp_path / "a.txt"
    csv.write_text("filename,label\nx.png,a\n")
    listing.write_text("a\n")
    with pytest.raises(UserError, match="2 images are called x.png"):
        pool(flat, str(csv))
    with pytest.raises(UserError, match="flat has no class folders"):
        pool(flat, str(listing))
    with pytest.raises(UserError, match="flat has no labels"):
        pool(flat)
    array = Sources(ArraySource("array", np.zeros((2, 8, 8), np.uint8)))
    with pytest.raises(UserError, match="array has no image files"):
        pool(array, str(csv))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--few-shot", "--knn"], "two measures"),
        (["--few-shot-classes", "x"], "is for --few-shot"),
        (["--few-shot", "--few-shot-way", "1"], "--few-shot-way must be at least 2"),
        (["--few-shot", "--few-shot-shots", "5", "0"], "--few-shot-shots must be at least 1, not 0"),
        (["--few-shot", "--few-shot-queries", "0"], "--few-shot-queries must be at least 1"),
        (["--few-shot", "--few-shot-episodes", "1"], "--few-shot-episodes must be at least 2"),
    ],
)
def test_wrong_flags_end_with_exit_code_2(words, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_lincls(["DIR", *words])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line


def test_an_encoder_is_read_as_it_is(folder):
    """Nothing is trained: the encoder's tensors and mode are those from before."""
    from moco.eval.features import EvalData, FeatureExtractor

    torch.manual_seed(0)
    encoder = build_encoder("test_resnet", 4, size=16).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    extractor = FeatureExtractor(EvalData(16, 8), torch.device("cpu"), (0.5,) * 3, (0.2,) * 3)
    source = pool(open_sources(path=str(folder)))
    fewshot.measure_few_shot(encoder, source, extractor, FewShotConfig(2, (1,), 2, 3, 0))
    assert encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
