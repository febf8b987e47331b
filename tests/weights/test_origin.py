"""How an encoder was pretrained goes with every file that holds it, and older files say it too."""

import json
import shutil

import pytest
import torch
from conftest import TINY, differences, load

import main_lincls
import main_pretrain
import main_semisup
from moco import average as average_door
from moco import cli
from moco import describe as describe_door
from moco.cli.flag_classes import PRETRAIN, dests
from moco.cli.pretrain import pretrain_parser
from moco.weights.layouts import open_file
from moco.weights.origin import FLAGS, NEGATIVES, _named_as_flags, pretraining_of
from moco.weights.read import open_backbone

pytestmark = pytest.mark.usefixtures("restored")
SHORT = [word for word in TINY if word not in ("--moco-k", "20")]
QUEUE = "--moco-k 20"
# A run's flags; what its recipe has, where None stands for a flag that means nothing to it; its projection head.
METHODS = {
    "moco": (f"{QUEUE} --mlp --moco-t 0.2 --cos", {"--moco-k": 20, "--moco-t": 0.2, "--schedule": None}, [96, 96, 16]),
    "synco": (f"{QUEUE} --n-hard 8 --n1 4 --hard-start-epoch 0", {"--n1": 4, "--n4": 64, "--mochi": None}, [96, 16]),
    "mochi": (f"{QUEUE} --mochi 8 4 2", {"--mochi": [8, 4, 2], "--n1": None, "--hard-start-epoch": 10}, [96, 16]),
    "simclr": ("--aug v2", {"--moco-k": None, "--moco-m": None, "--views": 2, "--aug": "v2"}, [96, 96, 16]),
    "supcon": ("", {"--moco-k": None, "--warm-from": None, "--base-temperature": 0.07}, [96, 96, 16]),
    "supcon queue": (f"--method supcon {QUEUE} --mochi 8 4 2", {"--moco-k": 20, "--mochi": [8, 4, 2]}, [96, 96, 16]),
    "hcl": ("--beta 0.5", {"--beta": 0.5, "--moco-k": None, "--warm-from": None}, [96, 96, 16]),
    "dcl": ("", {"--beta": None, "--n1": None}, [96, 96, 16]),
    "moco_v3": ("--moco-mlp-dim 24", {"--moco-mlp-dim": 24, "--moco-m": 0.99, "--mlp": None}, [96, 24, 16]),
}


def trained(images, out, name, *more: str):
    words = [str(images), *SHORT, "--steps", "1", "--lr", "1e-5", "--save-dir", str(out), *METHODS[name][0].split()]
    named = [] if "--method" in words else ["--method", name]
    assert main_pretrain.worker(cli.parse_pretrain([*words, *named, *more])) == 0
    return next(iter(out.glob("checkpoint_*")))


def aged(path, folder, *lost: str):
    """A file as it was written by an earlier version, its run's flags beside it."""
    state = load(path)
    for name in ("pretraining", *lost):
        del state["run"][name]
    folder.mkdir()
    torch.save(state, folder / path.name)
    shutil.copy(path.parent / "log_settings.json", folder)
    return folder / path.name


@pytest.mark.parametrize("name", METHODS)
def test_a_run_of_every_method_says_its_recipe_and_head(image_folder, tmp_path, name):
    _, expected, widths = METHODS[name]
    path = trained(image_folder, tmp_path / "run", name)
    run = load(path)["run"]
    made = run["pretraining"]
    assert made["method"] == name.split()[0]
    assert {flag: made["recipe"].get(flag) for flag in expected} == expected
    assert made["projection"]["widths"] == widths
    assert made["projection"]["kind"] == ("mlp" if len(widths) > 2 else "linear")
    assert made["projection"].get("batchnorm", False) == (name == "moco_v3")
    assert (made["data"], made["steps"], made["seed"]) == ({"name": run["data"]["name"], "images": 24}, 1, 3)
    del made["torch"]
    assert open_backbone(str(aged(path, tmp_path / "old"))).pretraining == made  # of the flags in the file
    del made["data"]  # which an older log_settings.json does not say
    older = open_backbone(str(aged(path, tmp_path / "older", "flags", "data")))
    same = {**made, "recipe": {**made["recipe"], "--amp": "off"}}
    assert {**older.pretraining, "recipe": {**same["recipe"], **older.pretraining["recipe"]}} == same
    assert pretraining_of(older.file, {}).origin == "log_settings.json"


@pytest.fixture(scope="module")
def run(image_folder, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    return trained(image_folder, folder, "synco", "--steps", "6", "--save-every", "1", "--ema", "0.9")


def made_in(path) -> dict:
    return load(path)["run"]["pretraining"]


def test_probes_fine_tunings_and_averages_hand_it_on(run, image_folder, tmp_path, capsys):
    made = made_in(run)
    older = {name: value for name, value in made.items() if name != "torch"}  # which older files do not say of a run
    words = [str(image_folder), "-b", "8", "-j", "0", "--epochs", "1", "--features", "cached"]
    for kind, source, expected in (("new", run, made), ("old", aged(run, tmp_path / "aged"), older)):
        flags = ["--pretrained", str(source), "--save-dir", str(tmp_path / kind)]
        assert main_lincls.worker(cli.parse_lincls([*words, *flags])) == 0
        assert made_in(tmp_path / kind / "checkpoint.pth.tar") == expected
    assert main_lincls.worker(  # which goes on without the pretraining's file
        cli.parse_lincls([*words, "--epochs", "2", "--resume", "auto", "--save-dir", str(tmp_path / "new")])
    ) == 0  # fmt: skip
    probe = tmp_path / "new" / "checkpoint.pth.tar"
    assert made_in(probe) == made
    tuned = [str(image_folder), "-b", "8", "-j", "0", "--epochs", "1", "--pretrained", str(probe)]
    assert main_semisup.worker(cli.parse_semisup([*tuned, "--save-dir", str(tmp_path / "tuned")])) == 0
    tuned = made_in(tmp_path / "tuned" / "checkpoint_semisup.pth.tar")
    assert tuned == {**made, "finetuned": {"name": load(probe)["run"]["data"]["name"], "epochs": 1}}
    for kind, source in (("new", run), ("old", tmp_path / "aged" / run.name)):
        both = [str(source)] * 2
        assert average_door.main([*both, "--no-refresh", "--out", str(tmp_path / f"{kind}.pth.tar")]) == 0
        found = made_in(tmp_path / f"{kind}.pth.tar")
        assert differences({**found, "projection": made["projection"]}, made if kind == "new" else older) == []
    capsys.readouterr()
    for path in (run, probe, tmp_path / "tuned" / "checkpoint_semisup.pth.tar", tmp_path / "new.pth.tar"):
        assert describe_door.main([str(path)]) == 0
        said = capsys.readouterr().out
        assert "method synco" in said
        assert "\npretrained by synco --moco-k 20 --moco-m 0.999 " in said
        assert "projection linear 96-16; 2 epochs, 6 steps on 24 images of " in said
        assert said.count("seed 3 (checkpoint)") == ("tuned" not in str(path.parent))
        assert said.count("; then fine-tuned on ") == ("tuned" in str(path.parent))


def test_a_classifier_that_does_not_say_it_is_of_no_known_method(run, image_folder, tmp_path, capsys):
    words = [str(image_folder), "-b", "8", "-j", "0", "--epochs", "1", "--features", "cached"]
    assert main_lincls.worker(cli.parse_lincls([*words, "-a", "test_resnet", "--save-dir", str(tmp_path)])) == 0
    assert "pretraining" not in load(tmp_path / "checkpoint.pth.tar")["run"]
    shutil.copy(run.parent / "log_settings.json", tmp_path)  # a pretraining's in the same folder
    assert pretraining_of(open_file(str(tmp_path / "checkpoint.pth.tar")), {}).value == {}
    capsys.readouterr()
    assert describe_door.main([str(tmp_path / "checkpoint.pth.tar")]) == 1  # a random encoder saw no batch
    assert "method not recorded" in capsys.readouterr().out


def test_every_flag_of_a_pretraining_has_its_place():
    known = {flag for flags in FLAGS.values() for flag in flags.split()}
    elsewhere = "--arch --stem --channels --size --levels --mean --std --method --auto"
    to_rounding = "--head-impl --head-precision --compile --compile-mode --channels-last --aug-device"
    assert known | {*elsewhere.split(), *to_rounding.split(), NEGATIVES} == PRETRAIN.fixed | PRETRAIN.free
    beside = {dest: flag for flag, dest in dests(pretrain_parser()).items()}
    renamed = _named_as_flags(dict.fromkeys(beside, 1))
    assert {flag for flag in known if flag not in renamed} == set()


def test_a_damaged_entry_is_refused(run, tmp_path, capsys):
    state = load(run)
    state["run"]["pretraining"]["recipe"]["--moco-k"] = {"x": 1}
    torch.save(state, tmp_path / "c.pth.tar")
    assert describe_door.main([str(tmp_path / "c.pth.tar")]) == 2
    assert "its entry run.pretraining.recipe is a dict" in capsys.readouterr().err
    (tmp_path / "c.json").write_text(json.dumps({"kind": "moco backbone", "pretraining": {"method": 3}}))
    torch.save({"w": torch.ones(1)}, tmp_path / "c.pt")
    assert describe_door.main([str(tmp_path / "c.pt")]) == 2
    assert "pretraining.method is 3, not a word" in capsys.readouterr().err
