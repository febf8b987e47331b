"""The linear probe: the protocol's rules, one process against two, resume, and each mistake's sentence."""

import json
import shutil

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, environment, run
from PIL import Image
from torch import nn

import main_lincls
from moco import checkpoint, probe
from moco.data import ArraySource, BadImages, EpochSampler, Labelled, Sources, make_loader
from moco.encoder import build_encoder
from moco.errors import TrainingError, UserError
from moco.meters import RunLog
from moco.options import parse_lincls

CPU = torch.device("cpu")
ARCH = "test_resnet"  # timm's, 0.4 million parameters
TINY = ["-a", ARCH, "--size", "16", "-b", "8", "-j", "0", "--seed", "3", "--lr", "0.3", "-p", "2"]


@pytest.fixture(scope="module")
def hard_folder(tmp_path_factory):
    """Three classes that a random encoder tells apart badly: 24 images to train on, 15 held out."""
    root = tmp_path_factory.mktemp("hard")
    rng = np.random.default_rng(1)
    for split, count in (("train", 8), ("val", 5)):
        for label in range(3):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 200, (16, 16, 3)) + 15 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A contrastive checkpoint in upstream's layout, its running statistics not those of a fresh network."""
    torch.manual_seed(0)
    encoder = build_encoder(ARCH, 16, mlp=True, size=16)
    for _ in range(30):
        encoder(torch.randn(8, 3, 16, 16))
    entries = {f"module.encoder_q.{name}": value for name, value in encoder.state_dict().items()}
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint_0001.pth.tar"
    torch.save({"epoch": 2, "arch": ARCH, "state_dict": entries, "optimizer": {}}, path)
    return path


def probe_once(folder, save_dir, *words) -> dict:
    """Run the program in this process; returns result.json (knn.json with --knn)."""
    args = parse_lincls([str(folder), *TINY, "--save-dir", str(save_dir), *map(str, words)])
    assert main_lincls.worker(args) == 0
    return json.loads((save_dir / ("knn.json" if args.knn else "result.json")).read_text())


def state_of(save_dir, name="checkpoint.pth.tar") -> dict:
    return torch.load(save_dir / name, weights_only=True)


def make_probe() -> probe.Probe:
    torch.manual_seed(0)
    return probe.Probe(build_encoder("resnet18", 10, size=16), CPU, (0.5,) * 3, (0.2,) * 3, seed=0)


# ---------------------------------------------------------------------------------------------------- the protocol


def test_defaults_are_upstreams():
    args = parse_lincls(["DIR"])
    assert (args.arch, args.lr, args.schedule, args.epochs, args.batch_size) == ("resnet50", 30.0, [60, 80], 100, 256)
    assert (args.momentum, args.weight_decay, args.amp, args.features) == (0.9, 0.0, "off", "views")


def test_head_starts_as_published_and_nothing_else_is_trained():
    model = make_probe()
    weight, bias = model.encoder.fc.weight, model.encoder.fc.bias
    assert [p is q for p, q in zip(model.trained, (weight, bias), strict=True)] == [True, True]
    assert abs(float(weight.detach().std()) - 0.01) < 3e-4
    assert abs(float(weight.detach().mean())) < 5e-4
    assert not bias.any()
    assert not any(module.training for module in model.encoder.modules())


def test_same_numbers_and_gradients_as_upstreams_forward_through_the_whole_network():
    model = make_probe()
    images, labels = torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8), torch.arange(6)
    ours = model.logits(model.features(images))
    nn.functional.cross_entropy(ours, labels).backward()
    gradients = [p.grad.clone() for p in model.trained]
    for p in model.trained:
        p.grad = None
    theirs = model.encoder((images.float() / 255 - 0.5) / 0.2)
    nn.functional.cross_entropy(theirs, labels).backward()
    torch.testing.assert_close(ours, theirs)
    for mine, p in zip(gradients, model.trained, strict=True):
        torch.testing.assert_close(mine, p.grad)


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "dpn68", "mobilenet_v3_small"])
def test_heads_of_other_families_are_probed(arch):
    """A timm network, one whose classifier is a 1x1 convolution, and one with dropout before its last layer."""
    torch.manual_seed(0)
    model = probe.Probe(build_encoder(arch, 4, size=32), CPU, (0.5,) * 3, (0.2,) * 3, seed=0)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        whole = model.encoder((images.float() / 255 - 0.5) / 0.2)
    torch.testing.assert_close(model.logits(model.features(images)), whole)


def test_separable_images_reach_all_right(image_folder, tmp_path, capsys):
    found = probe_once(image_folder, tmp_path, "--epochs", 3, "--schedule", 2)
    assert found["acc1"] == found["best_acc1"] == 100.0
    assert (found["classes"], found["train_images"], found["val_images"], found["epochs"]) == (2, 24, 8, 3)
    output = capsys.readouterr().out.splitlines()
    assert "a baseline" in output[0]
    assert output[-1] == " * Acc@1 100.000 Acc@5 100.000 (best Acc@1 100.000)"
    records = [json.loads(line) for line in (tmp_path / "lincls.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "val_acc1" in r] == [3, 6, 9]
    rates = {r["step"]: r["lr"] for r in records if "lr" in r}
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
    reference = model.frozen()
    model.check_frozen(reference, "the file")
    model.encoder.state_dict()[name].view(-1)[0] += 1
    with pytest.raises(TrainingError, match=f"1 tensors .* the file, the first {name}"):
        model.check_frozen(reference, "the file")


def test_an_encoder_in_train_mode_ends_the_run_after_an_epoch(hard_folder, pretrained, tmp_path, monkeypatch):
    features = probe.Probe.features

    def in_train_mode(self, images):
        self.encoder.train()
        return features(self, images)

    monkeypatch.setattr(probe.Probe, "features", in_train_mode)
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


def test_evaluation_repeats_the_accuracy_and_finds_the_encoder_in_the_checkpoint(hard_folder, pretrained, tmp_path):
    trained = probe_once(hard_folder, tmp_path, "--pretrained", pretrained, "--epochs", 1)
    log = (tmp_path / "lincls.jsonl").read_text()
    again = probe_once(hard_folder, tmp_path, "--resume", tmp_path / "checkpoint.pth.tar", "-e")
    assert [again[x] for x in ("acc1", "acc5", "best_acc1")] == [trained[x] for x in ("acc1", "acc5", "best_acc1")]
    assert (tmp_path / "lincls.jsonl").read_text() == log


def test_neighbours_of_frozen_features(image_folder, pretrained, tmp_path, capsys):
    found = probe_once(image_folder, tmp_path, "--pretrained", pretrained, "--knn", "--knn-k", 5)
    assert (found["knn"], found["k"], found["T"]) == (100.0, 5, 0.1)
    assert capsys.readouterr().out.splitlines()[-1].startswith(" * k-NN 100.000 (k=5, T=0.1, cosine, encoder features")


def test_cached_features_are_those_of_whole_images(image_folder, tmp_path):
    found = probe_once(image_folder, tmp_path, "--epochs", 4, "--schedule", 3, "--features", "cached")
    assert found["acc1"] == 100.0
    model, source = make_probe(), ArraySource("grey", np.zeros((5, 16, 16, 3), np.uint8), labels=np.arange(5))
    feed = probe.Feed(size=16, batch=2, seed=0, workers=0, cached=True)
    data = feed.of(model, source, lambda batch, source: None, training=True)
    epochs = [torch.cat([labels for _, labels in data.batches(e, probe.Stopwatch())]).tolist() for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [0, 1, 2, 3, 4]
    assert epochs[0] != epochs[1]


TWO = """
import sys
import main_lincls
from moco.distributed import launch
from moco.options import parse_lincls

def both(args):
    main_lincls.worker(args)
    args.knn = True
    return main_lincls.worker(args)

if __name__ == "__main__":
    sys.exit(launch(both, parse_lincls()))
"""


@pytest.mark.dist
def test_two_processes_equal_one(hard_folder, pretrained, tmp_path):
    words = ["--pretrained", pretrained, "--epochs", 2, "--schedule", 1, "--knn-k", 5]
    probe_once(hard_folder, tmp_path / "one", *words)
    probe_once(hard_folder, tmp_path / "one", *words, "--knn")
    script = tmp_path / "two.py"
    script.write_text(TWO)
    arguments = [*TINY, "--save-dir", tmp_path / "two", *words, "--nproc", 2, hard_folder]
    done = run(str(script), *arguments, env=environment(PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done.stderr
    for name, keys in (("result.json", ("acc1", "acc5", "best_acc1")), ("knn.json", ("knn",))):
        one, two = (json.loads((tmp_path / n / name).read_text()) for n in ("one", "two"))
        assert [one[k] for k in keys] == [two[k] for k in keys]
        assert 20 < one[keys[0]] < 100  # 15 held-out images: the last step is padded, and counted without the padding
    one, two = (state_of(tmp_path / name)["state_dict"] for name in ("one", "two"))
    assert list(one) == list(two)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


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
        images = probe.Images(
            model, make_loader(Labelled(source, 16, train=False), sampler), sampler, lambda batch, source: None
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(probe.distributed, "world_size", lambda: 2)
            patch.setattr(probe.distributed, "rank", lambda rank=rank: rank)
            patch.setattr(probe.distributed, "sum_over_ranks", lambda values: values)
            right += probe.validate(model, images).acc1
    assert right == pytest.approx(100.0)


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
    assert "one value a channel" in sentence(image_folder, tmp_path, "--mean", 0.5, "--std", 0.2)


def test_a_checkpoint_of_another_run_is_refused(image_folder, hard_folder, pretrained, tmp_path):
    probe_once(image_folder, tmp_path, "--epochs", 1)
    path = tmp_path / "checkpoint.pth.tar"
    assert "fc.weight differs (2 entries do)" in sentence(hard_folder, tmp_path, "--resume", path)
    assert "trained with -a test_resnet" in sentence(image_folder, tmp_path, "-a", "resnet18", "--resume", path)
    found = sentence(image_folder, tmp_path, "--resume", path, "--pretrained", pretrained)
    assert "another encoder than --pretrained" in found
    state = checkpoint.read(str(path))
    checkpoint.write({**state, "optimizer": {}}, str(path))
    assert "does not fit this optimizer" in sentence(image_folder, tmp_path, "--resume", path)


def test_a_loss_that_is_not_finite_ends_the_run(hard_folder, tmp_path):
    with pytest.raises(TrainingError, match="lower --lr"):
        probe_once(hard_folder, tmp_path, "--epochs", 4, "--lr", "1e38")


def test_a_source_without_a_pair_is_refused_with_its_reason():
    source = ArraySource("grey", np.zeros((2, 8, 8), np.uint8))
    with pytest.raises(UserError, match=r"no val here.*--val-data"):
        probe.labelled_pair(Sources(source, no_pair="no val here"))


def test_unreadable_images_are_named_once_for_each_set_and_limited(capsys, tmp_path):
    log = RunLog(str(tmp_path), tensorboard=False)
    note = probe.bad_image_notes(log)
    train, val = (ArraySource(name, np.zeros((200, 8, 8), np.uint8)) for name in ("train", "val"))
    batch = {"bad": torch.tensor([-1, 3, -1])}
    for source in (train, train, val):
        note(batch, source)
    names = [line.rsplit(" ", 1)[-1] for line in capsys.readouterr().out.splitlines()]
    assert names == ["train[3]", "val[3]"]
    with pytest.raises(UserError, match=f"limit is {probe.MAX_BAD_IMAGES}"):
        note({"bad": torch.arange(150)}, train)
    assert BadImages(1).limit == 1
    log.close()
