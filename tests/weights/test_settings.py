"""What an encoder was trained at goes with its file: evaluations without a flag equal those with the run's flags."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, differences, load, save_pretrained

import main_lincls
import main_semisup
from detection import run as detection_run
from moco import cli, data
from moco import embed as embed_door
from moco import export as export_door
from moco.cli import commands
from moco.cli.commands import parse_embed
from moco.errors import UserError
from moco.eval import embed
from moco.models.encoder import build_encoder
from moco.weights import describe, settings
from moco.weights.layouts import File, open_file
from moco.weights.read import open_backbone
from moco.weights.settings import settings_of, settle_from_file

pytestmark = pytest.mark.usefixtures("restored")
REST = TINY[4:]  # without -a and --size
PROBE = ["-b", "8", "-j", "0", "--seed", "3"]
# What a run was trained at, and a flag with which an evaluation would give another number or none.
RUNS = {
    "statistics": ("-a test_resnet --size 16 --mean 0 0 0 --std 1 1 1", "--mean 0.485 0.456 0.406"),
    "size": ("-a test_resnet --size 24", "--size 32"),
    "stem": ("-a resnet18 --size 32 --stem imagenet", "--size 40"),
    "channels": ("-a test_resnet --size 16 --channels 1", "--std 0.5"),
    "vit": ("-a test_vit --size 32 --mean 0.1 0.2 0.3", "--mean 0.5 0.5 0.5"),
}


@pytest.fixture(scope="module")
def runs(image_folder, tmp_path_factory):
    """A checkpoint of one step for each of RUNS."""
    import main_pretrain

    torch.set_num_threads(1)
    found = {}
    for name, (flags, _) in RUNS.items():
        folder = tmp_path_factory.mktemp(name)
        words = [str(image_folder), *flags.split(), *REST, "--steps", "1", "--lr", "1e-5", "--save-dir", str(folder)]
        assert main_pretrain.worker(cli.parse_pretrain(words)) == 0
        found[name] = next(iter(folder.glob("checkpoint_*")))
    return found


def probed(image_folder, out, *words) -> dict:
    """A probe's checkpoint, one epoch on cached features; all of its bits depend on every setting."""
    flags = ["--features", "cached", "--lr", "1e-6", "--epochs", "1", "--save-dir", str(out), *map(str, words)]
    assert main_lincls.worker(cli.parse_lincls([str(image_folder), *PROBE, *flags])) == 0
    return load(out / "checkpoint.pth.tar")


def old(path, folder):
    """A file as it was written before files held the settings, its run's flags beside it."""
    state = load(path)
    del state["run"]["images"]
    folder.mkdir()
    torch.save(state, folder / path.name)
    for beside in path.parent.glob("*_settings.json"):
        shutil.copy(beside, folder)
    return folder / path.name


# ------------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("name", RUNS)
def test_an_evaluation_without_flags_is_the_one_with_the_runs_flags(runs, image_folder, tmp_path, name, capsys):
    flags, other = (words.split() for words in RUNS[name])
    typed = probed(image_folder, tmp_path / "typed", "--pretrained", runs[name], *flags)
    assert "differs from" not in capsys.readouterr().out
    bare = probed(image_folder, tmp_path / "bare", "--pretrained", runs[name])
    assert differences(typed, bare) == []
    said = capsys.readouterr().out
    assert said.count("settings of ") == 1 and f"settings of {runs[name]}: -a {flags[1]} " in said
    assert "(checkpoint)" in said and "default" not in said
    aged = probed(image_folder, tmp_path / "aged", "--pretrained", old(runs[name], tmp_path / "old"))
    assert differences(typed, aged) == []
    assert "(log_settings.json)" in capsys.readouterr().out
    wrong = probed(image_folder, tmp_path / "wrong", "--pretrained", runs[name], *other) if name != "vit" else None
    assert wrong is None or differences(typed["state_dict"], wrong["state_dict"]) != []


def test_neighbours_and_fine_tuning_take_them_too(runs, image_folder, tmp_path):
    flags = RUNS["statistics"][0].split()
    found = []
    for name, words in (("typed", flags), ("bare", [])):
        words = [str(image_folder), "--pretrained", str(runs["statistics"]), *PROBE, *words]
        out = ["--save-dir", str(tmp_path / name)]
        assert main_lincls.worker(cli.parse_lincls([*words, "--knn", *out])) == 0
        assert main_semisup.worker(cli.parse_semisup([*words, "--epochs", "1", *out])) == 0
        results = [json.loads((tmp_path / name / file).read_text()) for file in ("knn.json", "result.json")]
        results[1].pop("settings")
        found.append((results, load(tmp_path / name / "checkpoint_semisup.pth.tar")))
    assert differences(*found) == []
    assert found[0][0][0]["size"] == 16
    assert found[0][1]["run"]["images"]["mean"] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", ["probe", "fine-tuned"])
def test_a_classifiers_file_is_evaluated_at_its_own(runs, image_folder, tmp_path, kind):
    main, parse, name = {
        "probe": (main_lincls, cli.parse_lincls, "checkpoint.pth.tar"),
        "fine-tuned": (main_semisup, cli.parse_semisup, "checkpoint_semisup.pth.tar"),
    }[kind]
    words = [str(image_folder), *PROBE, "--epochs", "1"]
    trained = [*words, "--pretrained", str(runs["channels"]), "--save-dir", str(tmp_path / "a")]
    assert main.worker(parse(trained)) == 0
    reported = json.loads((tmp_path / "a" / "result.json").read_text())
    files = [tmp_path / "a" / name, old(tmp_path / "a" / name, tmp_path / "old")]
    for path in files:
        out = tmp_path / path.parent.name / "again"
        assert main.worker(parse([*words, "--evaluate", "--resume", str(path), "--save-dir", str(out)])) == 0
        again = json.loads((out / "evaluate.json").read_text())
        assert (again["acc1"], again["arch"]) == (reported["acc1"], "test_resnet")
    assert main.worker(parse([*trained, "--resume", "auto"])) == 0  # and a resumed one is the same run


def test_features_and_exports_take_them(runs, image_folder, tmp_path, capsys, alone):
    found = {}
    for name, words in (("typed", RUNS["statistics"][0].split()), ("bare", [])):
        flags = [str(runs["statistics"]), str(image_folder), "--picture", "none", "-j", "0", "--out"]
        assert embed_door.main([*flags, str(tmp_path / name), *words]) == 0
        found[name] = np.load(tmp_path / name / "features.npz")["features"]
    assert np.array_equal(found["typed"], found["bare"])
    for words, mean in (([], [0.0, 0.0, 0.0]), (["--dataset", "cifar10"], [0.4914, 0.4822, 0.4465])):
        words = [str(runs["statistics"]), "--to", "features", "--out", str(tmp_path / "f.pt"), *words]
        assert export_door.main(words) == 0
        assert json.loads((tmp_path / "f.json").read_text())["mean"] == mean
    said = capsys.readouterr().out
    assert f"--mean 0.4914 0.4822 0.4465 differs from the 0 0 0 that {runs['statistics']} has; 0.4914" in said
    again = embed.read_features(
        parse_embed([str(tmp_path / "f.pt"), str(image_folder), "-j", "0"])
    )  # the card's, of the export
    assert "--mean 0.4914 0.4822 0.4465" in again.summary and "(card)" in again.summary
    lines = describe.describe_file(str(runs["statistics"]))
    assert any(line.startswith("settings: ") and "--mean 0 0 0 --std 1 1 1" in line for line in lines)


# ----------------------------------------------------------------------------------------------- which of them wins


def test_a_typed_flag_wins_and_says_what_it_differs_from(runs, image_folder, tmp_path, capsys):
    path = str(runs["size"])
    words = ["--pretrained", path, "--size", "32", "--mean", "0.485", "0.456", "0.406"]
    probed(image_folder, tmp_path, *words)
    said = capsys.readouterr().out
    assert f"\n--size 32 differs from the 24 px that {path} was trained at; 32 is used\n" in said
    assert said.count("differs from") == 1  # --mean is the run's
    assert "test_resnet at 32 px" in said
    assert json.loads((tmp_path / "result.json").read_text())["size"] == 32
    (tmp_path / "c.yml").write_text("size: 32\n")
    args = cli.parse_lincls([str(image_folder), "--pretrained", path, "--config", str(tmp_path / "c.yml")])
    assert settle_from_file(args, path).warnings and args.size == 32  # a file of flags is typed, too


def test_without_a_file_the_defaults_are_upstreams():
    for parse in (cli.parse_lincls, cli.parse_semisup):
        args = parse(["DIR"])
        settled = settle_from_file(args, "")
        assert (args.arch, args.stem, args.size, args.channels, settled.summary) == ("resnet50", "auto", None, None, "")


def test_what_a_file_does_not_say_is_the_datas_own_and_called_default(image_folder, tmp_path):
    torch.manual_seed(0)
    path = str(save_pretrained(tmp_path / "theirs.pth", build_encoder("resnet18", 16, size=16), "resnet18"))
    args = cli.parse_lincls(["--dataset", "mnist5k", "--pretrained", path])
    settled = settle_from_file(args, path)
    source = data.open_sources("mnist5k", channels=args.channels).train
    assert source.load(0).mode == "RGB"  # the file's network takes colours
    assert settled.of(source) == (28, [0.1307] * 3, [0.3081] * 3)
    assert settled.summary.splitlines()[1] == (
        f"settings of {path}: -a resnet18 (checkpoint); --stem cifar --channels 3 (its tensors); "
        "--size 28 --mean 0.1307 0.1307 0.1307 --std 0.3081 0.3081 0.3081 (default)"
    )
    assert settled.of(data.open_sources(path=str(image_folder)).train)[0] == 32  # a 3x3 stem is for small images


def test_grey_networks_get_grey_images(runs, image_folder):
    found = embed.read_features(parse_embed([str(runs["channels"]), str(image_folder), "-j", "0", "--split", "val"]))
    assert found.source.channels == 1
    assert "--channels 1 --mean 0.449 --std 0.226 (checkpoint)" in found.summary


def test_wrong_counts_are_a_sentence(runs, image_folder, tmp_path, capsys):
    for words in (["--mean", "0.5"], ["--channels", "1"]):
        args = cli.parse_lincls([str(image_folder), "--pretrained", str(runs["size"]), *words])
        settled = settle_from_file(args, str(runs["size"]))
        source = data.open_sources(path=str(image_folder), channels=args.channels).train
        if "--mean" in words:
            with pytest.raises(Exception, match="one value a channel, and these images have 3"):
                settled.of(source)
        else:  # the statistics of colours are not a grey image's
            assert settled.of(source)[1] == [0.4490]
            assert "--channels 1 differs from the 3 that" in settled.summary


def test_published_weights_take_colours_at_the_datas_size():
    args = cli.parse_lincls(["--dataset", "mnist5k", "--pretrained", "torchvision:IMAGENET1K_V2"])
    settled = settle_from_file(args, args.pretrained)
    assert (args.arch, args.stem, args.channels) == ("resnet50", "imagenet", 3)
    assert settled.of(data.open_sources("mnist5k", channels=3).train) == (28, [0.1307] * 3, [0.3081] * 3)


# ------------------------------------------------------------------------------------------------------- old files


def test_flags_that_were_left_out_were_the_data_sets_own():
    flags = {"arch": "resnet18", "dataset": "cifar10", "size": None, "channels": None, "mean": None, "std": [1, 1, 1]}
    found = settings.recorded({"run": {}}, flags, "log_settings.json")
    assert {name: value for name, (value, _) in found.items()} == {
        "size": 32, "channels": 3, "mean": [0.4914, 0.4822, 0.4465], "std": [1, 1, 1],
    }  # fmt: skip
    tuned = settings.recorded({"run": {"settings": {"--size": 40}}}, flags, "semisup_settings.json")
    assert tuned["size"].value == 40
    theirs = {"arch": "resnet18", "mean": "imagenet", "size": "large"}  # another program's words
    assert settings.recorded({"run": {"images": 7}}, theirs, "c.json") == {}


def test_a_classifiers_flags_are_its_own_programs(tmp_path):
    """Beside a probe's file lie a pretraining's flags too where both have the folder ./."""
    torch.save({"arch": "x", "best_acc1": 1.0, "run": {}, "state_dict": {"w": torch.ones(1)}}, tmp_path / "c.pth.tar")
    for name, size in (("log", 32), ("lincls", 48)):
        (tmp_path / f"{name}_settings.json").write_text(json.dumps({"arch": "x", "size": size}))
    file = open_file(str(tmp_path / "c.pth.tar"))
    assert (file.settings["size"], file.beside) == (48, "lincls_settings.json")


def test_a_first_convolution_that_is_small_by_itself_is_no_changed_stem(tmp_path):
    """HRNet's has 3x3 and no pooling, in its library as here; nothing of it moves a run's random numbers."""
    file = File("theirs.pth", {}, build_encoder("hrnet_w18_small", 2).state_dict(), {})
    before = torch.get_rng_state()
    found = settings_of(file, "hrnet_w18_small")
    assert (found["stem"].value, found["channels"].value) == ("imagenet", 3)
    assert torch.equal(before, torch.get_rng_state())


def test_methods_without_a_queue_write_them_too(image_folder, tmp_path, in_process):
    words = "-a test_resnet --size 16 --method simclr -b 8 -j 0 --amp off --knn-every 0 --steps 1 --std 0.1 0.2 0.3"
    assert in_process(*words.split(), image_folder, "--save-dir", tmp_path) == 0
    assert load(tmp_path)["run"]["images"] == {
        "stem": "imagenet", "size": 16, "channels": 3, "mean": [0.485, 0.456, 0.406], "std": [0.1, 0.2, 0.3],
    }  # fmt: skip


def test_an_opened_backbone_has_the_runs_shape(runs):
    for name, shape in (("stem", ("resnet18", "imagenet", 32, 3)), ("channels", ("test_resnet", "imagenet", 16, 1))):
        found = open_backbone(str(runs[name]))
        assert (found.arch, found.stem, found.size, found.channels) == shape


# ------------------------------------------------------------------------------------------------ a folder for a file


def test_every_reader_takes_a_runs_folder_and_says_which_checkpoint_that_is(tmp_path, capsys):
    """The newest of a pretraining, though others lie there; else the best of a fine-tuning; no folder without any."""
    names = ("checkpoint.pth.tar", "model_best.pth.tar", "checkpoint_0002.pth.tar", "checkpoint_0010.pth.tar")
    readers = [
        lambda path: commands.export_parser().parse_args([path, "--to", "timm"]).checkpoint,
        lambda path: commands.describe_parser().parse_args([path]).checkpoint,
        lambda path: commands.parse_embed([path, "DIR"]).checkpoint,
        lambda path: commands.parse_retrieval([path, "DIR"]).checkpoint,
        lambda path: cli.parse_lincls(["--pretrained", path, "DIR"]).pretrained,
        lambda path: cli.parse_semisup(["--pretrained", path, "DIR"]).pretrained,
        lambda path: cli.parse_semisup(["DIR", path]).pretrained,
        lambda path: detection_run.parse([path, "--task", "voc"]).checkpoint,
    ]
    for expected in names[1:2] + names[2:]:
        for name in names[: names.index(expected) + 1]:
            (tmp_path / name).touch()
        for read in readers:
            assert read(str(tmp_path)) == str(tmp_path / expected)
            assert capsys.readouterr().err == f"{tmp_path}: the checkpoint {expected} of this run is taken\n"
            assert read(str(tmp_path / names[0])) == str(tmp_path / names[0])
            assert capsys.readouterr().err == ""
    (tmp_path / "empty").mkdir()
    for read in readers:
        with pytest.raises((UserError, SystemExit)):
            read(str(tmp_path / "empty"))
        said = capsys.readouterr().err
        assert not said or "empty holds no checkpoint of a run; give a file, or the folder of another run." in said
