"""The program as functions: the same words, the same refusals, and what comes back."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ARCH, environment, server
from support import typed_options
from support.here import run_here

import moco
from moco import cli
from moco.cli import commands, looking
from moco.library import child, program, results

TINY = {
    "arch": ARCH, "size": 16, "batch_size": 8, "moco_k": 20, "moco_dim": 16, "workers": 0, "amp": "off", "seed": 3,
    "print_freq": 1,
}  # fmt: skip
READ = {"batch_size": 8, "workers": 0}


@pytest.fixture
def here(alone, restored, monkeypatch):
    """Runs are in this process, and answer as from one of their own."""
    run_here(monkeypatch)


@pytest.fixture(scope="module")
def trained(image_folder, tmp_path_factory) -> results.RunResult:
    """A run of two epochs, in this process."""
    flags = (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
    with pytest.MonkeyPatch.context() as patch:
        for name in set(os.environ) - set(environment()):
            patch.delenv(name)
        run_here(patch)
        run = moco.pretrain(image_folder, tmp_path_factory.mktemp("run"), epochs=2, knn_every=1, keep=1, **TINY)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = flags
    return run


# ------------------------------------------------------------------------------------------------------ options


def words(text: str, **options) -> tuple[dict, dict]:
    """What pretraining makes of words and of options."""
    return vars(cli.parse_pretrain(text.split())), vars(program.PRETRAIN.arguments(options, "DIR"))


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("DIR --epochs 3 --lr 0.5 --cos --mlp", {"epochs": 3, "lr": np.float64(0.5), "cos": True, "mlp": True}),
        ("DIR --cos --seed 3 --lr 0.5", {"cos": np.bool_(True), "seed": torch.tensor(3), "lr": np.array(0.5)}),
        ("DIR --no-cos --schedule 1 2 --knn-k 5 7", {"cos": False, "schedule": [1, 2], "knn_k": (5, 7)}),
        ("DIR --schedule --mean .1 .2 .3 --std 1 1 1", {"schedule": [], "mean": (0.1, 0.2, 0.3), "std": [1, 1, 1]}),
        ("DIR --mochi 20 8 4 --moco-k 64 -b 16 --overwrite", {"mochi": (20, 8, 4), "moco_k": 64, "b": 16,
                                                              "overwrite": True, "aug": None}),
        ("DIR --learning_rate 0.1 --download", {"learning_rate": 0.1, "download": True, "compile": False}),
        ("DIR --config synco_in1k_200ep --epochs 2", {"config": "synco_in1k_200ep", "epochs": 2}),
        ("DIR --multiprocessing-distributed --seed -1", {"nproc": "all", "seed": -1}),
        ("DIR --nproc 2 --val-data a/b", {"nproc": 2, "val_data": Path("a/b")}),
        ("DIR --type-starts noise=3 mixup=1 --n4 4 --n3 4", {"type_starts": ["noise=3", "mixup=1"], "n4": 4, "n3": 4}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_options_are_the_words_of_the_command(text, options):
    typed, called = words(text, **options)
    assert typed == called


REFUSED = [
    ({"epochs": 0}, "--epochs 0"),
    ({"epochs": True}, "--epochs"),
    ({"aug": "v9"}, "--aug v9"),
    ({"lr": "fast"}, "--lr fast"),
    ({"mochi": [1, 2]}, "--mochi 1 2"),
    ({"rise_epochs": 2, "mlp": True}, "--rise-epochs 2 --mlp"),
    ({"config": "synco_in1k_2000ep"}, "--config synco_in1k_2000ep"),
]


@pytest.mark.parametrize(("options", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_what_the_command_refuses_is_raised_in_its_words(options, text, capsys):
    with pytest.raises(moco.UserError) as raised:
        moco.pretrain("DIR", **options)
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit):
        cli.parse_pretrain(["DIR", *text.split()])
    assert capsys.readouterr().err == f"error: {raised.value} (--help lists the flags)\n"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"epoch": 3}, "epoch is no option of moco.pretrain; did you mean epochs?"),
        ({"zzz": 3}, "zzz is no option of moco.pretrain."),
        ({"image_size": 32}, "image_size is no option of moco.pretrain; did you mean size?"),  # --input-size is closer
        ({"help": True}, "help is no option of moco.pretrain"),
        ({"no_cos": True}, "no_cos is no option of moco.pretrain"),
        ({"save_dir": "x"}, "save_dir is no option of moco.pretrain: give out."),
        ({"arch": "a", "model": "b"}, "arch and model are the same option; give one of them."),
        ({"epochs": [1, 2]}, r"epochs takes one value, not \[1, 2\]."),
        ({"lr": {}}, "lr takes one value, not {}."),
        ({"cos": "DIR"}, "cos is True or False, not 'DIR'."),
        ({"lr": object}, "lr takes words, numbers and paths, not <class 'object'>."),
        ({"config": "FILE", "recompute": False}, "recompute=False: config sets --recompute, which has no opposite"),
    ],
    ids=str,
)
def test_an_option_that_is_none_is_refused(options, sentence, tmp_path):
    if "config" in options:
        (tmp_path / "file.yml").write_text("recompute: true\n")
        options = {**options, "config": tmp_path / "file.yml"}
    with pytest.raises(moco.UserError, match=f"^{sentence}"):
        moco.pretrain("DIR", **options)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: moco.pretrain(3), "data is a path, not 3."),  # type: ignore[arg-type]
        (lambda: moco.pretrain(b"-images"), "data is a path, not b'-images'."),  # type: ignore[arg-type]
        (lambda: moco.pretrain("DIR", ["out"]), r"out is a path, not \['out'\]."),  # type: ignore[arg-type]
        (lambda: moco.evaluate(None, "DIR", out=3), "out is a path, not 3."),  # type: ignore[arg-type]
        (lambda: moco.evaluate(None, "DIR", ["knn"]), "protocol is one of"),  # type: ignore[arg-type]
    ],
    ids=["data", "bytes", "out", "folder", "protocol"],
)
def test_what_is_no_path_is_refused(call, sentence):
    with pytest.raises(moco.UserError, match=f"^{sentence}"):
        call()


def test_errors_are_of_one_class():
    for kind in (moco.UserError, moco.TrainingError, moco.OutageError):
        assert issubclass(kind, moco.MocoError)


def test_the_file_of_types_is_fresh():
    fresh = typed_options.PATH.read_text(encoding="utf-8") == typed_options.source()
    assert fresh, "run python tests/support/typed_options.py"


@pytest.mark.parametrize("name", ["pretrain", "evaluate", "embed", "neighbours", "export"])
def test_a_function_tells_its_options(name):
    function = getattr(moco, name)
    parameters = inspect.signature(function).parameters
    assert {"out", "size", "mean"} <= set(parameters)
    assert "Options:" in function.__doc__
    assert "side of the" in function.__doc__
    if name == "pretrain":
        assert parameters["epochs"].default == 200
        assert list(parameters)[:2] == ["data", "out"]


# ---------------------------------------------------------------------------------------------------- the calls


def test_a_run_is_where_it_says(trained):
    assert trained.checkpoint == trained.folder / "checkpoint_0001.pth.tar"
    records = [json.loads(line) for line in (trained.folder / "log.jsonl").read_text().splitlines()]
    assert trained.metrics == [record for record in records if "loss" in record][-1]
    assert trained.metrics["step"] == 6
    assert trained.knn == [record["knn"] for record in records if "knn" in record][-1]
    assert not trained.stopped


@pytest.mark.parametrize(
    ("names", "steps", "stopped"),
    [
        (["checkpoint_0002.pth.tar"], None, False),
        (["checkpoint_0001.pth.tar"], None, True),
        (["checkpoint_0001.pth.tar", "checkpoint_0002_step_00000007.pth.tar"], None, True),
        (["checkpoint_0003_step_00000009.pth.tar"], None, False),  # an epoch's end where no file was due
        (["checkpoint_0002_step_00000007.pth.tar"], 7, False),
        (["checkpoint_0002_step_00000007.pth.tar"], 8, True),
        (["checkpoint_0000.pth.tar"], 5, False),
    ],
    ids=str,
)
def test_a_run_that_ended_early_says_so(names, steps, stopped, tmp_path):
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "log.jsonl").write_text('{"step": 5, "loss": 1.0}\n')
    assert results.result_of(str(tmp_path), 3, steps).stopped == stopped


def test_a_folder_of_another_run_is_refused(trained, image_folder, here):
    with pytest.raises(moco.UserError, match="--overwrite"):
        moco.pretrain(image_folder, trained.folder, **TINY)


def test_a_run_that_diverges_is_a_training_error(image_folder, tmp_path, here):
    with pytest.raises(moco.TrainingError, match="steps in a row were not finite"):
        moco.pretrain(image_folder, tmp_path / "run", lr=1e30, max_bad_steps=1, **TINY)


@pytest.mark.dist
@pytest.mark.slow
def test_what_one_of_two_processes_refuses_is_raised(trained, image_folder, here, monkeypatch):
    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda method: server())
    with pytest.raises(moco.UserError, match=f"^{trained.folder} .*--overwrite"):
        moco.pretrain(image_folder, trained.folder, nproc=2, **TINY)


def test_a_missing_folder_is_a_user_error(tmp_path, here):
    with pytest.raises(moco.UserError, match="nothing does not exist"):
        moco.pretrain(tmp_path / "nothing", tmp_path / "run", **TINY)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("protocol", "key", "more"),
    [
        ("knn", "knn", {}),
        ("few_shot", "acc_1shot", {"few_shot_way": 2, "few_shot_shots": 1, "few_shot_queries": 2,
                                   "few_shot_episodes": 2}),
        ("linear", "acc1", {"epochs": 1}),
        ("finetune", "acc1", {"epochs": 1}),
        ("retrieval", "features", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_measure_is_the_content_of_its_file(protocol, key, more, trained, image_folder, tmp_path, here):
    kept = tmp_path / "kept"
    result = moco.evaluate(trained, image_folder, protocol, kept, seed=1, **READ, **more)
    assert key in result
    (path,) = [p for p in kept.glob("*.json") if "settings" not in p.name]
    assert result == json.loads(path.read_text())


def test_a_measure_without_a_folder_leaves_nothing(trained, image_folder, here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program.tempfile, "tempdir", str(tmp_path))
    assert moco.evaluate(str(trained.folder), image_folder, **READ)["val_images"] == 8
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(moco.UserError, match='^protocol="linear" trains: give out'):
        moco.evaluate(trained, image_folder, "linear")
    with pytest.raises(moco.UserError, match="^protocol is one of knn, few_shot"):
        moco.evaluate(trained, image_folder, "nn")  # type: ignore[arg-type]
    with pytest.raises(moco.UserError, match='^knn is no option of moco.evaluate: give protocol="knn"'):
        moco.evaluate(trained, image_folder, knn=True)  # type: ignore[call-arg]


def test_an_old_result_is_not_taken_for_a_new_one(trained, image_folder, here, tmp_path, monkeypatch):
    (tmp_path / "knn.json").write_text('{"knn": 1.0}')
    monkeypatch.setattr(child, "run", lambda worker, args: 0)
    assert moco.evaluate(trained, image_folder, out=tmp_path) == {}


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_features_are_those_of_the_encoder(kind, trained, image_folder, here, tmp_path):
    found = moco.embed(trained.checkpoint, image_folder, tmp_path, format=kind, picture="none", **READ)
    assert found.files == [tmp_path / f"features.{kind}"]
    assert found.labels.tolist() == [0] * 4 + [1] * 4
    assert found.classes == ["blue", "red"]
    encoder = moco.load_encoder(trained)
    images = torch.stack([encoder.transform(path) for path in found.paths])
    with torch.no_grad():
        assert np.array_equal(encoder(images).numpy(), found.features)
    assert "8 x" in repr(found)


def test_features_alone_write_nothing(trained, image_folder, here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = moco.embed(trained, image_folder, split="train", **READ)
    assert (len(found.features), found.files, list(tmp_path.iterdir())) == (24, [], [])
    with pytest.raises(moco.UserError, match="^picture is of the files that go to out; give both."):
        moco.embed(trained, image_folder, picture="tsne")


def test_neighbours_are_those_of_the_command(trained, image_folder, here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = moco.neighbours(trained, image_folder, class_name="red", k=3, queries=2, **READ)
    assert [(query["class"], len(query["neighbours"])) for query in found["queries"]] == [("red", 3)] * 2
    assert list(tmp_path.iterdir()) == []
    picture = found["queries"][0]["name"]
    own = moco.neighbours(trained, image_folder, [picture], tmp_path, k=3, **READ)["queries"][0]
    near, same = ([one["similarity"] for one in q["neighbours"]] for q in (own, found["queries"][0]))
    assert near == pytest.approx(same, abs=1e-5) and own["name"] == picture
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"neighbours.{kind}" for kind in ("html", "json", "png")
    ]
    with pytest.raises(moco.UserError, match="^--class rde: .*did you mean red"):
        moco.neighbours(trained, image_folder, class_name="rde", **READ)


def test_an_export_says_where_it_is(trained, tmp_path, capsys):
    before = torch.random.get_rng_state()
    path = moco.export(trained.folder, "timm", tmp_path / "net.pth")
    assert path == tmp_path / "net.pth"
    assert path.exists()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert moco.load_encoder(path).arch == f"timm/{ARCH}"
    with pytest.raises(moco.UserError, match="detectron2's configurations"):
        moco.export(trained, "detectron2", tmp_path / "net.pkl")
    capsys.readouterr()


def test_a_checkpoint_is_a_file_a_folder_or_a_run(trained, tmp_path):
    assert {results.path_of(one) for one in (trained, trained.folder, str(trained.checkpoint))} == {
        str(trained.checkpoint)
    }
    assert results.path_of("torchvision:IMAGENET1K_V1") == "torchvision:IMAGENET1K_V1"
    (tmp_path / "checkpoint.pth.tar").touch()
    assert results.path_of(tmp_path) == str(tmp_path / "checkpoint.pth.tar")
    (tmp_path / "model_best_semisup.pth.tar").touch()
    assert results.path_of(tmp_path) == str(tmp_path / "model_best_semisup.pth.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(moco.UserError, match="holds no checkpoint of a run"):
        results.path_of(tmp_path / "empty")
    with pytest.raises(moco.UserError, match="a checkpoint is a file"):
        results.path_of({})  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------- modules and doors


@pytest.mark.parametrize(
    "first", ["import moco.embed, moco.export", "from moco import embed, export, neighbours", "import moco"]
)
def test_a_command_s_module_is_a_function_whatever_was_imported_first(first):
    code = f"""
import sys
{first}
import moco
for name in ("embed", "export", "neighbours"):
    door = getattr(moco, name)
    exec(f"import moco.{{name}}")
    assert getattr(moco, name) is door is sys.modules[f"moco.{{name}}"]
    assert callable(door.main) and "Example" in door.__doc__
try:
    moco.embed("x", "y", sizes=3)
except moco.MocoError as error:
    assert str(error) == "sizes is no option of moco.embed; did you mean size?"
else:
    raise AssertionError
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


def test_the_parsers_of_the_functions_are_those_of_the_commands(capsys):
    assert commands.parse_embed(["x", "DIR"]) == program.EMBED.arguments({}, "x", "DIR")
    assert looking.parse_neighbours(["x", "DIR"]) == program.NEIGHBOURS.arguments({}, "x", "DIR")
    assert commands.parse_retrieval(["x", "DIR"]) == program.RETRIEVAL.arguments({}, "x", "DIR")
    assert cli.parse_semisup(["DIR"]) == program.SEMISUP.arguments({}, "DIR")
