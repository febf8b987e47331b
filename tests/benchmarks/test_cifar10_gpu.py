"""accuracy/cifar10_gpu.py, dry: pack, run, stop, go on, the result's file, and a state that travels in pieces."""

import io
import json
import subprocess
import sys
import tarfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, environment, records
from PIL import Image
from support.versions import counted

from moco import run_folder
from moco.config import ValidationConfig
from moco.data import ArraySource, Sources
from moco.errors import UserError
from moco.eval import knn
from moco.eval.features import EvalData, FeatureExtractor
from moco.models.encoder import build_encoder

CLASSES = ("cat", "dog")
# What main_pretrain.py can do without in this run; test_resnet, which the other tests take, is timm's.
BLOCKED = ("timm", "sklearn", "scipy", "matplotlib", "mlxtend", "lightly", "wandb", "pandas")


@pytest.fixture(scope="module")
def bench(script):
    return script("accuracy.cifar10_gpu")


@pytest.fixture(scope="module")
def images():
    """{SPLIT/CLASS/NAME: JPEG}, 20 of each class to train on, 5 held out, 32 x 32 pixels."""
    draws, made = np.random.default_rng(0), {}
    for split, count in (("train", 20), ("test", 5)):
        for number, name in enumerate(CLASSES):
            for i in range(count):
                file = io.BytesIO()
                pixels = draws.integers(90 * number, 90 * number + 150, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(file, "JPEG")
                made[f"{split}/{name}/{i:05d}.jpg"] = file.getvalue()
    return made


@pytest.fixture(scope="module")
def packed(bench, images, tmp_path_factory):
    """The same as a tar, packed."""
    folder = tmp_path_factory.mktemp("cifar")
    with tarfile.open(folder / "cifar10.tar", "w") as tar:
        for name, content in sorted(images.items(), reverse=True):
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert bench.main(["pack", "--data", str(folder / "cifar10.tar"), "--pack", str(folder / "cifar10.npz")]) == 0
    return folder / "cifar10.npz"


def test_a_pack_holds_the_files_as_they_are(bench, images, packed, tmp_path):
    sources = dict(zip(("pretrain", "train", "test"), bench.unpack(packed), strict=True))
    for split in ("train", "test"):
        names, source = sorted(name for name in images if name.startswith(split)), sources[split]
        wanted = np.stack([np.asarray(Image.open(io.BytesIO(images[name]))) for name in names])
        assert source.images.dtype == np.uint8 and np.array_equal(source.images, wanted)
        assert [source.classes[i] for i in source.labels] == [name.split("/")[1] for name in names]
    for name, content in images.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(content)
    bench.pack(tmp_path / "data", tmp_path / "folder.npz")
    assert (tmp_path / "folder.npz").read_bytes() == packed.read_bytes()
    assert packed.stat().st_size < sum(map(len, images.values())) + 16 * len(images) + 3000


def test_what_cannot_be_packed_or_run_is_said(bench, tmp_path, capsys, monkeypatch):
    with pytest.raises(UserError, match="give --data, a tar or folder of train/CLASS"):
        bench.pack(tmp_path / "none.tar", tmp_path / "x.npz")
    with pytest.raises(UserError, match="does not hold images as train/CLASS"):
        bench.pack(tmp_path, tmp_path / "x.npz")
    with pytest.raises(UserError, match=r"make it by `python -m benchmarks.accuracy.cifar10_gpu pack`"):
        bench.unpack(tmp_path / "x.npz")
    monkeypatch.setattr(bench, "NEEDS", {"torch": "torch", "no_such_module": "NoSuch"})
    assert bench.main(["run"]) == 2
    assert capsys.readouterr().err == "error: this Python lacks NoSuch: install them, or take another.\n"


def test_a_run_stops_and_goes_on_here_and_elsewhere(bench, packed, tmp_path, capsys, alone, restored, monkeypatch):
    monkeypatch.setattr(bench, "PIECE", 1 << 20)
    monkeypatch.setattr(bench, "BEGAN", bench.time.monotonic())
    common = ["--dry", "--method", "synco", "--seed", "3", "--pack", str(packed)]
    here = [*common, "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    there = [*common, "--work", str(tmp_path / "there"), "--out", str(tmp_path / "result")]
    name = "dry_synco_seed3"

    assert bench.main(["run", *here, "--minutes", "0"]) == 0
    assert "not finished: the same command goes on" in capsys.readouterr().out
    state = run_folder.newest(str(tmp_path / "work" / name))
    assert state.endswith("checkpoint_0000_step_00000001.pth.tar")

    for first, end in ((0, 2), (2, 99)):
        assert bench.main(["pieces", *here, "--which", str(first), str(end)]) == 0
    parts = tmp_path / "out" / name
    last = max(parts.glob("*of*"))
    content = last.read_bytes()
    last.unlink()
    assert bench.main(["run", *there, "--pieces", str(parts)]) == 2
    assert "bring all" in capsys.readouterr().err
    last.write_bytes(content)
    assert bench.main(["run", *there, "--pieces", str(parts)]) == 0
    assert "published for plain MoCo: 82.6" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "result" / name).iterdir()} == {"log.txt", "log.jsonl", "result.json"}

    result = json.loads((tmp_path / "result" / name / "result.json").read_text())
    assert result["finished"] and list(result["knn"]) == ["1", "2"]
    assert all(set(found) == {"knn", "knn_output"} for found in result["knn"].values())
    assert [(one["from_step"], one["to_step"]) for one in result["commands"]] == [(0, 1), (1, 4)]
    assert result["seconds"] == pytest.approx(sum(one["seconds"] for one in result["commands"]))
    assert set(result["commands"][1]) >= {"images_per_second", "card", "torch", "triton", "commit"}
    assert result["flags"][:2] == ["--config", "configs/moco_cifar10.yml"]
    lines = records(tmp_path / "result" / name)
    assert [x["step"] for x in lines if "loss" in x] == [1, 2, 3, 4]
    log = (tmp_path / "result" / name / "log.txt").read_text()
    assert "synco" in log and "from epoch 0, step 1 of 4" in log


def test_methods_differ_in_their_negatives_alone(bench):
    from moco import cli

    parsed = {}
    for method in ("moco", "mochi", "synco"):
        args = bench.parse(["run", "--method", method, "--symmetric"])
        assert bench.name_of(args) == f"{method}_symmetric_seed0"
        parsed[method] = vars(cli.parse_pretrain(bench.words_of(args)))
    plain = parsed["moco"]
    assert (plain["epochs"], plain["batch_size"], plain["lr"], plain["moco_k"], plain["moco_m"], plain["moco_t"]) == (
        200, 512, 0.06, 4096, 0.99, 0.1,
    )  # fmt: skip
    assert (plain["bn_splits"], plain["stem"], plain["aug_device"], plain["symmetric"]) == (8, "cifar", "gpu", True)
    counts = {"method", "negatives", "mochi", "n_hard", "n1", "n2", "n3", "n4", "n5", "n6", "notes", "left_open"}
    for method in ("mochi", "synco"):
        assert {name for name in plain if plain[name] != parsed[method][name]} <= counts
        assert parsed[method]["method"] == method


def test_knn_is_of_the_features_and_of_the_output(bench):
    draws = np.random.default_rng(1)
    train, val = (ArraySource("x", draws.integers(0, 256, (n, 32, 32, 3), np.uint8), 3, ["a", "b", "c"],
                              draws.integers(0, 3, n)) for n in (60, 30))  # fmt: skip
    torch.manual_seed(0)
    encoder, cpu = build_encoder("test_resnet", 16, size=32), torch.device("cpu")
    extractor, seen = FeatureExtractor(EvalData(32, 16), cpu, (0.5,) * 3, (0.2,) * 3), {}
    trainer = SimpleNamespace(
        exit_code=None, due=lambda every: True, progress=SimpleNamespace(step=7, epoch=2, trained=1),
        log=SimpleNamespace(scalars=lambda step, found, **more: seen.update(found, step=step, **more)),
    )  # fmt: skip
    bench.report(trainer, encoder, Sources(train, train, val), extractor, 0, ValidationConfig(1, 0, (9,), 0.1))
    bank, asked = (extractor.whole(encoder, source, head=True) for source in (train, val))
    assert bank.z.shape == (60, 16)
    found = knn.knn_predict(replace(bank, x=bank.z), asked.z, k=(9,), temperature=0.1, num_classes=3)[0]
    assert seen["knn_output"] == pytest.approx(100 * float((found == asked.labels).double().mean()))
    assert seen["knn"] == pytest.approx(knn.evaluate_knn(encoder, train, val, extractor, k=(9,))[9])
    assert seen["knn"] != seen["knn_output"] and seen["finished_epochs"] == 2


def test_a_bare_python_is_enough_and_a_state_is_as_large_as_said(packed, tmp_path):
    block = f"import runpy, sys; sys.modules.update(dict.fromkeys({BLOCKED!r})); sys.argv[:] = sys.argv[1:]; "
    words = ["run", "--dry", "-a", "resnet18", "--stem", "cifar", "-b", "4", "--moco-k", "4096", "--minutes", "0"]
    words += ["--pack", str(packed), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    block += "runpy.run_module(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", block, "benchmarks.accuracy.cifar10_gpu", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (state,) = (tmp_path / "work").glob("*/checkpoint_*")
    assert 136e6 < state.stat().st_size < 138e6


@counted
def test_a_step_leaves_the_host_time(bench):
    """19,400 steps in nine minutes are 27 ms each; docs/running.md says what an operator takes of that."""
    pytest.importorskip("triton", reason="needs the package triton: pip install triton")
    from benchmarks.speed.step_operators import count

    for method, most in (("moco", 400), ("mochi", 405), ("synco", 405)):
        words = [word for word in bench.words_of(bench.parse(["run", "--method", method])) if word not in bench.GRAPHS]
        found, reads = count([*words, "--hard-start-epoch", "0"])
        assert reads == 0 and 300 < sum(part.total() for part in found.values()) <= most
