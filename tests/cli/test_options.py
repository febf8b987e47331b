"""The command line is a public interface: upstream's flags keep spelling, default and meaning."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from moco import cli
from moco.cli import commands
from moco.cli.methods import negatives_config
from moco.cli.pretrain import DEMO_CONFIG
from moco.config import MoCHiConfig, SynCoConfig

# main_moco.py of facebookresearch/moco: option, attribute, default. Two defaults differ and are listed below.
UPSTREAM = [
    ("-a --arch", "arch", "resnet50"),
    ("-j --workers", "workers", 32),
    ("--epochs", "epochs", 200),
    ("--start-epoch", "start_epoch", 0),
    ("-b --batch-size", "batch_size", 256),
    ("--lr --learning-rate", "lr", 0.03),
    ("--schedule", "schedule", [120, 160]),
    ("--momentum", "momentum", 0.9),
    ("--wd --weight-decay", "weight_decay", 1e-4),
    ("-p --print-freq", "print_freq", 10),
    ("--resume", "resume", ""),
    ("--world-size", "world_size", -1),
    ("--rank", "rank", -1),
    ("--dist-url", "dist_url", None),  # upstream: a multicast address, which current torch refuses
    ("--dist-backend", "dist_backend", "nccl"),
    ("--seed", "seed", None),
    ("--gpu", "gpu", None),
    ("--multiprocessing-distributed", "multiprocessing_distributed", False),
    ("--moco-dim", "moco_dim", 128),
    ("--moco-k", "moco_k", 65536),
    ("--moco-m", "moco_m", 0.999),
    ("--moco-t", "moco_t", 0.07),
    ("--mlp", "mlp", False),
    ("--aug-plus", "aug_plus", False),
    ("--cos", "cos", False),
    # SynCo
    ("--n-hard", "n_hard", 1024),
    ("--n1", "n1", 256),
    ("--n2", "n2", 256),
    ("--n3", "n3", 256),
    ("--n4", "n4", 64),
    ("--n5", "n5", 64),
    ("--n6", "n6", 64),
    ("--sigma", "sigma", 0.01),
    ("--delta", "delta", 0.01),
    ("--eta", "eta", 0.01),
    ("--warmup-epochs", "hard_start_epoch", 10),
    ("--save-dir", "save_dir", "./"),
]
LINCLS = {"epochs": 100, "lr": 30.0, "schedule": [60, 80], "weight_decay": 0.0, "pretrained": "", "evaluate": False}

# Every flag of the mains and commands. A flag may be added here; none is renamed or dropped.
FLAGS = set(Path(__file__).with_name("flags.txt").read_text().split())

SYNCO_LINE = (
    "-a resnet50 --lr 0.03 --batch-size 256 --dist-url tcp://localhost:10001 --multiprocessing-distributed "
    "--world-size 1 --rank 0 --mlp --moco-t 0.2 --aug-plus --cos "
    "--n-hard 1024 --n1 256 --n2 256 --n3 256 --n4 64 --n5 64 --n6 64 DIR"
)


@pytest.mark.parametrize(("words", "name", "default"), UPSTREAM, ids=[entry[1] for entry in UPSTREAM])
def test_upstreams_flags_keep_spelling_and_default(words, name, default):
    args = cli.parse_pretrain(["DIR"])
    assert getattr(args, name) == default
    known = {word: a.dest for a in cli.pretrain_parser()._actions for word in a.option_strings}
    assert {known[word] for word in words.split()} == {name}


@pytest.mark.parametrize(("name", "default"), LINCLS.items())
def test_the_probes_defaults_are_upstreams(name, default):
    assert getattr(cli.parse_lincls(["DIR"]), name) == default


def test_flags_are_frozen():
    parsers = (
        cli.pretrain_parser(), cli.lincls_parser(), cli.semisup_parser(), commands.export_parser(),
        commands.describe_parser(),
    )  # fmt: skip
    assert {word for p in parsers for a in p._actions for word in a.option_strings} == FLAGS


def test_syncos_line_parses_as_typed():
    args = cli.parse_pretrain(SYNCO_LINE.split())
    assert (args.method, args.data, args.mlp, args.cos, args.aug_plus) == ("synco", "DIR", True, True, True)
    assert negatives_config(args).recipe == SynCoConfig()


@pytest.mark.parametrize(
    ("words", "method"),
    [
        ("DIR", "moco"),
        ("DIR --n5 8", "synco"),
        ("--method synco DIR", "synco"),
        ("DIR --mochi 1024 512 256", "mochi"),
        ("--method mochi DIR", "mochi"),
    ],
)
def test_the_method_follows_from_the_flags(words, method):
    assert cli.parse_pretrain(words.split()).method == method


def test_mochis_three_numbers():
    args = cli.parse_pretrain(["DIR", "--mochi", "512", "100", "50"])
    assert (args.n_hard, negatives_config(args).recipe) == (512, MoCHiConfig(100, 50))


def test_a_file_sets_defaults_that_flags_override(tmp_path):
    file = tmp_path / "recipe.yml"
    file.write_text("lr: 0.5\nn1: 7\nschedule: [3, 4]\nmlp: true\ndata: elsewhere\nmoco_t: 0.3\n")
    args = cli.parse_pretrain(["--config", str(file)])
    assert (args.lr, args.n1, args.schedule, args.moco_t) == (0.5, 7, [3, 4], 0.3)
    assert (args.mlp, args.data) == (True, "elsewhere")
    args = cli.parse_pretrain(["--config", str(file), "--lr", "2", "--no-mlp", "DIR"])
    assert (args.lr, args.mlp, args.data, args.method) == (2.0, False, "DIR", "synco")
    assert cli.parse_pretrain(["--config", str(file), "--method", "moco"]).method == "moco"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yml")), ids=lambda p: p.stem)
def test_every_recipe_parses(path):
    args = cli.parse_pretrain(["--config", str(path), "DIR"])
    assert args.data == "DIR"


def test_no_words_are_the_demo():
    args = cli.parse_pretrain([])
    assert args.demo
    assert (args.dataset, args.save_dir, args.method) == ("mnist5k", "runs/demo", "synco")


@pytest.mark.parametrize(
    "words",
    ["--save-dir X --resume auto --max-minutes 2", "--overwrite --keep 2 --knn-every 0 --knn-k 5 --trial 3", "-j0 -p5",
     "--nproc 2 --max-restarts 1 --seed=4", "--dist-url tcp://localhost:1 --multiprocessing-distributed --rank 0"],
)  # fmt: skip
def test_the_demo_takes_what_no_training_depends_on(words):
    args = cli.parse_pretrain(words.split())
    assert args.demo
    assert (args.dataset, args.method, args.epochs) == ("mnist5k", "synco", 15)


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ("--batch_size 1024 --learning_rate 0.5 --temp 0.1 --cosine", "--batch-size"),  # SupContrast's
        ("--cosine --print_freq 5", "--cos"),
        ("-b64", "--batch-size"),
        ("--lr=0.1", "--lr"),
        ("--epochs 2", "--epochs"),
        ("--warmup-epochs 0", "--hard-start-epoch"),
        ("--no-mlp", "--mlp"),
        ("--seed 0 --amp off", "--amp"),
        ("--lr_decay_epochs 5,6", "--schedule"),
        ("--config configs/moco_v2_in1k.yml", "--config"),
    ],
)
def test_a_training_without_images_is_not_the_demo(words, flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.parse_pretrain(words.split())
    assert (
        f"error: {flag} is a flag of training, but no images are named: give DIR, or --dataset"
        in capsys.readouterr().err
    )


def test_the_demos_recipe_takes_every_flag():
    recipe = cli.parse_pretrain(["--config", DEMO_CONFIG, "--epochs", "2", "--n1", "5"])
    assert (recipe.dataset, recipe.method, recipe.epochs, recipe.n1, recipe.lr) == ("mnist5k", "synco", 2, 5, 0.06)
    assert not recipe.demo
    other = cli.parse_pretrain(["--dataset", "mnist5k", "--batch_size", "64", "--cosine"])
    assert (other.demo, other.method, other.batch_size) == (False, "moco", 64)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("DIR --epochs 0", "--epochs must be at least 1"),
        ("DIR --lr nan", "--lr must be a number above 0"),
        ("DIR --moco-t 0", "--moco-t"),
        ("DIR --moco-m 2", "--moco-m is a share"),
        ("DIR --n1 5 --moco-k 16", "--n-hard 1024 is more than the queue"),
        ("DIR --n1 5 --mochi 1 2 3", "two methods"),
        ("DIR --method moco --n1 5", "--method moco does not use --n1"),
        ("DIR --hard-stop-epoch 3", "--hard-stop-epoch must come after"),
        ("DIR --type-starts warp=3", "--type-starts warp=3"),
        ("DIR --type-starts mixup=3step", "write KIND=EPOCH or KIND=Nsteps, KIND one of mixup, interpolation,"),
        ("DIR --type-starts mixup=steps", "--type-starts mixup=steps: write KIND=EPOCH or KIND=Nsteps"),
        ("DIR --type-starts mixup=-3steps", "--type-starts mixup=-3steps: write KIND=EPOCH or KIND=Nsteps"),
        ("DIR --type-starts mixup=3 mixup=30steps", "mixup=30steps: mixup has one start, in epochs or in steps"),
        ("--n1 4 --type-starts mixup=3 DIR", "--type-starts DIR: write KIND=EPOCH or KIND=Nsteps"),
        ("DIR --type-starts mixup=3", "--type-starts mixup: this run draws no synthetic negatives and no mixup; leave"),
        ("DIR --mochi 9 4 4 --type-starts noise=3steps", "this run draws mixup, interpolation and no noise; leave"),
        ("DIR --mochi 9 4 0 --type-starts interpolation=3", "this run draws mixup and no interpolation; leave it out"),
        ("DIR --n3 0 --n1 4 --type-starts mixup=3", "this run draws interpolation, extrapolation, noise, perturbation"),
        ("DIR --method supcon --type-starts mixup=3", "--type-starts mixup: this run draws no synthetic negatives"),
        ("DIR --std 0 1 1", "--std must be a number above 0, not 0"),
        ("DIR --channels 3 --mean 1 2", "--mean and --std take one value a channel"),
        ("DIR --unknown", "--unknown"),
        ("DIR --arch", "--arch"),
        ("DIR --config missing.yml", "missing.yml is neither a file nor a recipe"),
        ("DIR --size 2", "--size must be at least 8"),
        ("DIR --moco-k 3000000000", "--moco-k must be at most 2147483647, not 3000000000"),
        ("DIR --warm-from inf", "--warm-from must be at least 0 and finite, not inf"),
        ("DIR --wd inf", "--weight-decay must be at least 0 and finite, not inf"),
        ("DIR --eta nan", "--eta must be a finite number, not nan"),
        ("DIR --delta=-inf", "--delta must be a finite number, not -inf"),
        ("DIR --std 1 nan 1", "--std must be a number above 0, not nan"),
        ("DIR --mean inf", "--mean must be a finite number, not inf"),
        ("DIR --max-minutes nan", "--max-minutes must be at least 0, not nan"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(words, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.parse_pretrain(words.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert sentence in error
    assert re.fullmatch(r"error: [^\n]*\n", error)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nonsense: 3", "nonsense is no flag"),
        ("lr: fast", "--lr"),
        ("a: [", "not a YAML file"),
        ("lr: " + "[" * 5000, "not a YAML file"),
        ("lr: 2020-13-41", "not a YAML file"),
        ("lr: " + "1" * 5000, "not a YAML file"),
        ("lr: 1\0", "not a YAML file"),
        ('save-dir: "a\\0b"', "not a YAML file: NUL in"),
        ('save-dir: "a\\ud800b"', "not a YAML file"),
        ("lr: &a [*a]", "not a YAML file"),
        ("- 3", "FLAG: VALUE"),
        ("plateau: [1, 2]", "bad.yml: plateau takes one value, not the list [1, 2]."),
        ("cos: [yes]", "bad.yml: cos takes one value, not the list [True]."),
        ("method: simclr\nsymmetric: true", "--method simclr does not use --symmetric; leave one of them out."),
        ("method: mochi\ntype-starts: [noise=3]", "this run draws mixup, interpolation and no noise; leave it out"),
        ("hard-stop-epoch: 0\nhard-start-epoch: 0", "--hard-stop-epoch must come after --hard-start-epoch"),
    ],
)
def test_mistakes_in_a_file_are_sentences_too(text, sentence, tmp_path, capsys):
    file = tmp_path / "bad.yml"
    file.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        cli.parse_pretrain(["--config", str(file), "DIR"])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_a_typed_method_drops_what_the_files_method_alone_uses(tmp_path):
    file = tmp_path / "synco.yml"
    file.write_text("n1: 4\nmoco-k: 2000\nsymmetric: true\ntype-starts: [interpolation=3, mixup=5steps]\n")
    assert cli.parse_pretrain(["--config", str(file), "DIR"]).type_starts == {"interpolation": 3}
    args = cli.parse_pretrain(["--config", str(file), "--method", "simclr", "DIR"])
    assert (args.method, args.type_starts, args.type_start_steps) == ("simclr", {}, {})
    assert args.notes == ["the file's --type-starts of interpolation, mixup is dropped: none is drawn"]
    args = cli.parse_pretrain(["--config", str(file), "--n3", "0", "DIR"])
    assert (args.type_starts, args.type_start_steps) == ({"interpolation": 3}, {})


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("name", ["main_pretrain", "main_lincls", "main_semisup"])
def test_a_wrong_flag_is_answered_before_torch_is_imported(name, capsys, monkeypatch):
    """As a script; None in the place of torch makes its import an ImportError."""
    monkeypatch.setattr(sys, "argv", [name, "DIR", "--batch-sise", "8"])
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    assert "unrecognized arguments: --batch-sise 8; did you mean --batch-size?" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # of runpy: other tests import the doors
@pytest.mark.parametrize(
    "name",
    ["average", "bench", "data", "demo", "describe", "embed", "export", "neighbours", "report", "retrieval", "sweep"],
)
@pytest.mark.usefixtures("restored")
def test_so_does_every_command(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, "--no-such-flag"])
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module(f"moco.{name}", run_name="__main__")
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--rise-epochs 1", "--rise-epochs goes with --cos or --plateau, not with --schedule"),
        ("--method moco --moco-mlp-dim 99", "--method moco does not use --moco-mlp-dim"),
        ("--method hcl --base-temperature 0.07", "--method hcl does not use --base-temperature"),
        ("--method synco --base-temperature 0.07", "--method synco does not use --base-temperature"),
        ("--method simclr --moco-m-cos", "--method simclr does not use --moco-m-cos"),
    ],
)
def test_a_flag_that_would_change_nothing_is_refused(argv, sentence, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.parse_pretrain(["DIR", *argv.split()])
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("method", ["hcl", "moco", "moco_v3"])
def test_a_files_base_temperature_is_not_that_of_another_method(method):
    words = ["--config", str(ROOT / "configs" / "supcon_cifar10.yml"), "DIR"]
    assert cli.parse_pretrain(words).base_temperature == 0.07
    assert cli.parse_pretrain([*words, "--method", method]).base_temperature is None
