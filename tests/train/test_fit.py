"""What a small set needs: the rules by their values, what a run says of them, and what --auto takes."""

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import write_images

from moco import cli
from moco.errors import UserError
from moco.train import fit
from moco.train.fit import Place


@pytest.mark.parametrize(
    ("side", "size"),
    [(0, 0), (8, 32), (28, 32), (47, 32), (48, 64), (96, 96), (100, 96), (111, 96), (112, 0), (500, 0)],
)
def test_views_are_of_the_images_own_size_in_steps_of_32(side, size):
    assert fit.fitting_size(side) == size


@pytest.mark.parametrize(
    ("images", "processes", "steps", "batch"),
    [(4096, 1, 16, 256), (4000, 1, 16, 128), (2000, 1, 16, 64), (500, 1, 16, 16), (40, 1, 16, 16), (24, 1, 16, 8),
     (8, 1, 16, 4), (3, 1, 16, 2), (1, 1, 16, 2), (2000, 1, 4, 256), (500, 1, 4, 64), (24, 3, 16, 12), (40, 4, 16, 16),
     (2000, 6, 16, 96)],
)  # fmt: skip
def test_an_epoch_has_so_many_steps(images, processes, steps, batch):
    assert fit.fitting_batch(images, processes, steps) == batch
    assert batch % processes == 0


@pytest.mark.parametrize(
    ("images", "batch", "steps", "K"),
    [(50_000, 256, 39_000, 16_384), (2000, 64, 620, 512), (2000, 64, 10, 128), (24, 8, 9, 8), (24, 8, 1, 8),
     (24, 24, 1, 16), (500, 1, float("inf"), 128), (1, 1, float("inf"), 1)],
)  # fmt: skip
def test_a_queue_holds_half_of_the_images_and_is_soon_full(images, batch, steps, K):
    assert fit.fitting_queue(images, batch, steps) == K


@pytest.mark.parametrize(
    ("steps", "m"),
    [(10**6, 0.999), (4603, 0.999), (4602, 0.99), (459, 0.99), (458, 0.95), (90, 0.95), (89, 0.9), (1, 0.9)],
)
def test_the_key_encoder_has_left_where_it_began(steps, m):
    assert fit.fitting_momentum(steps) == m
    assert m**steps <= 0.01 or m == 0.9


@pytest.mark.parametrize(
    ("epochs", "steps", "fill", "stop", "start"),
    [(200, 100, 50, None, 10), (400, 100, 50, None, 20), (15, 31, 16, None, 1), (100, 31, 16, None, 5),
     (3, 3, 2, None, 1), (1, 3, 2, None, 0), (50, 1, 20, None, 20), (5, 1, 20, None, 4), (50, 1, 20, 8, 7),
     (20, 5, 1, 1, 0)],
)  # fmt: skip
def test_synthetic_negatives_start_once_the_queue_is_full_and_inside_the_run(epochs, steps, fill, stop, start):
    assert fit.fitting_start(epochs, steps, fill, stop) == start


@pytest.mark.parametrize(("total", "found"), [(200, [120, 160]), (100, [60, 80]), (5, [3, 4]), (4, []), (1, [])])
def test_milestones_are_the_recipes_shares(total, found):
    assert fit.fitting_milestones(total) == found


@pytest.mark.parametrize(
    ("batch", "parts"), [(64, 8), (32, 4), (24, 3), (16, 2), (8, 2), (6, 2), (4, 2), (9, None), (2, None)]
)
def test_parts_of_batchnorm_have_eight_images(batch, parts):
    assert fit.fitting_parts(batch) == parts


def flags(*words):
    return cli.parse_pretrain([*map(str, words), "DIR"])


def chosen(*words, place=None, kept=None):
    args, said = fit.choose(flags("--auto", *words), place or Place(2000, 32), kept or {})
    return args, said


def test_what_auto_takes_for_two_thousand_small_images():
    args, said = chosen("--epochs", 20, "--method", "synco")
    assert (args.size, args.aug, args.batch_size, args.moco_k, args.moco_m) == (32, "cifar", 64, 512, 0.99)
    assert (args.n_hard, args.n1, args.n4, args.hard_start_epoch, args.schedule) == (64, 16, 4, 1, [12, 16])
    assert said.startswith(
        "--auto for 2000 images of 32 px: --size 32 (default 224), --aug cifar (default v1), --batch-size 64"
    )
    assert "--schedule 12 16 (default 120 160)" in said


def test_the_demos_counts_are_those_of_its_queue():
    args, _ = chosen("--method", "synco", "--moco-k", 2048, "--epochs", 15, "--cos", place=Place(4000, 28))
    assert (args.batch_size, args.moco_m, args.n_hard) == (128, 0.99, 256)
    assert [args.n1, args.n2, args.n3, args.n4, args.n5, args.n6] == [64, 64, 64, 16, 16, 16]


def test_nothing_is_taken_where_the_recipes_fit():
    published = flags("--auto", "--method", "synco")
    args, said = fit.choose(published, Place(1_281_167, 375), {})
    assert vars(args) == vars(published)
    assert said == "--auto for 1281167 images of 375 px: the defaults fit"
    assert list(fit.misfits(published, Place(1_281_167))) == []


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--moco-k", 4096], "moco_k", 4096),
        (["-b", 100], "batch_size", 100),
        (["--moco-m", 0.5], "moco_m", 0.5),
        (["--schedule", 120, 160], "schedule", [120, 160]),
        (["--lr-decay-epochs", "120,160"], "schedule", [120, 160]),
        (["--size", 224], "size", 224),
        (["--aug", "v1"], "aug", "v1"),
        (["--aug-plus"], "aug", None),
        (["--method", "synco", "--n-hard", 500], "n_hard", 500),
        (["--method", "synco", "--n1", 200], "n1", 200),
        (["--mochi", 300, 100, 50], "mochi", [300, 100, 50]),
        (["--method", "synco", "--warmup-epochs", 10], "hard_start_epoch", 10),
        (["--warm", "--warm-epochs", 5], "warm_epochs", 5),
        (["-b", 8, "--bn-splits", 4], "bn_splits", 4),
    ],
)
def test_what_is_typed_or_filed_stays(words, name, value, tmp_path):
    assert getattr(chosen("--epochs", 20, *words)[0], name) == value
    typed = [str(word) for word in words]
    recipe = {}  # the same as a file
    while typed:
        flag, typed = typed[0], typed[1:]
        ends = next((i for i, word in enumerate(typed) if word.startswith("-")), len(typed))
        recipe[flag.lstrip("-").replace("b", "batch-size") if flag == "-b" else flag.lstrip("-")] = typed[:ends]
        typed = typed[ends:]
    file = tmp_path / "recipe.yml"
    file.write_text("".join(
        f"{flag}: {'true' if not values else values[0] if len(values) == 1 else '[' + ', '.join(values) + ']'}\n"
        for flag, values in recipe.items()
    ))  # fmt: skip
    assert getattr(chosen("--epochs", 20, "--config", file)[0], name) == value


def test_other_families():
    args, _ = chosen("--method", "simclr")
    assert (args.batch_size, args.moco_k, args.aug, args.bn_splits) == (256, 65536, "supcon", None)
    args, _ = chosen("--method", "moco_v3", "--epochs", 10, place=Place(300, 32))
    assert (args.batch_size, args.aug, args.moco_m, args.moco_k) == (64, "cifar", 0.9, 65536)
    args, _ = chosen("--method", "mochi", "--epochs", 20)
    assert (args.mochi, args.n_hard, args.s, args.s2) == ([64, 32, 16], 64, 32, 16)
    args, _ = chosen("--dataset", "cifar10")
    assert (args.aug, args.batch_size) == (None, 64)  # the data set's own
    args, _ = chosen("--warm", "--epochs", 8, "--method", "simclr")
    assert args.warm_epochs == 1


def test_what_cannot_be_another_is_the_checkpoints():
    assert chosen("--epochs", 20, kept={"moco_k": 1024})[0].moco_k == 1024
    assert chosen("--epochs", 20, "--moco-k", 64, kept={"moco_k": 1024})[0].moco_k == 64


def test_more_hard_rows_than_the_chosen_queue_are_refused_by_name():
    with pytest.raises(
        UserError, match=r"--n-hard 2000 is more than the 512 rows of the queue that --auto takes for 2000"
    ):
        chosen("--method", "synco", "--n-hard", 2000)


@pytest.mark.parametrize(
    ("words", "images", "said"),
    [
        (["-b", 256], 300, ["an epoch of 300 images is 1 step of 256 and leaves 44 images out: give --batch-size 16"]),
        (["-b", 16, "--moco-k", 512, "--steps", 40], 1000,
         ["the queue's 512 rows are random until it is full after 32 steps, and this run has 40: give --moco-k 128"]),
        (["-b", 64, "--epochs", 3], 2000, ["--moco-m 0.999 leaves the key encoder 91 % of its first weights at the end "
                                           "of 93 steps: give --moco-m 0.95"]),
        (["--epochs", 100], 10**6, ["--schedule 120 160, and the run ends after 100 epochs, before the learning rate "
                                    "drops: give --schedule 60 80"]),
        (["--epochs", 150], 10**6, ["the run ends after 150 epochs, before the learning rate also drops at 160: give "
                                    "--schedule 90 120"]),
        (["--epochs", 100, "--cos"], 10**6, []),
        (["--epochs", 100, "--plateau", 3], 10**6, []),
        (["--steps", 10**5], 10**6, []),
        (["--method", "simclr", "--epochs", 4], 2000, []),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_with_what_would(words, images, said):
    big = [] if "--moco-k" in words or "simclr" in words else ["--moco-k", 16]
    found = [
        line
        for line in fit.misfits(flags(*big, *words), Place(images))
        if "--moco-m" not in line or "--moco-m" in "".join(said)
    ]
    found = [line for line in found if any(text in line for text in said)] if said else found
    assert len(found) == len(said), found
    assert all(line.startswith("warning: ") and line.endswith(", or leave it to --auto.") for line in found)


@pytest.mark.parametrize(
    ("side", "size", "said"),
    [(20, 224, "enlarges images whose short side is 20 px 11.2 times, .*: give --size 32 --aug cifar, or"),
     (100, 224, "give --size 96, or"), (112, 224, ""), (20, 40, ""), (0, 224, "")],
)  # fmt: skip
def test_enlarged_images(side, size, said):
    assert bool(fit.enlarged(side, size)) == bool(said)
    assert re.search(said, fit.enlarged(side, size))


@pytest.mark.parametrize(
    ("parts", "batch", "said"),
    [(4, 8, "--bn-splits 2"), (8, 16, "2 images.*--bn-splits 2"), (8, 24, "--bn-splits 3"), (8, 32, ""), (2, 8, ""),
     (1, 2, ""), (2, 4, "")],
)  # fmt: skip
def test_parts_of_two_images(parts, batch, said):
    assert bool(fit.parts_warning(parts, batch)) == bool(said)
    assert re.search(said, fit.parts_warning(parts, batch))


@pytest.fixture(scope="module")
def forty(tmp_path_factory):
    """40 images of 40 pixels."""
    return write_images(
        tmp_path_factory.mktemp("forty"),
        {"train": 20},
        ["a", "b"],
        lambda rng, label: rng.integers(0, 255, (40, 40, 3)),
    )


FEW = [
    "-a",
    "test_resnet",
    "--moco-dim",
    "16",
    "-j",
    "0",
    "--amp",
    "off",
    "--knn-every",
    "0",
    "--seed",
    "0",
    "--epochs",
    "3",
]


def test_a_run_takes_keeps_and_resumes_what_auto_chose(forty, tmp_path, in_process, capsys):
    words = [*FEW, "--auto", "--method", "synco", "--save-dir", tmp_path, forty]
    assert in_process(*words) == 0
    out = capsys.readouterr().out
    assert "synco, test_resnet at 32 px, 40 images" in out
    assert "\n--auto for 40 images of 40 px: --size 32 (default 224), --aug cifar (default v1), --batch-size 16" in out
    assert "warning" not in out
    kept = json.loads((tmp_path / "log_settings.json").read_text())
    assert (kept["auto"], kept["size"], kept["batch_size"], kept["moco_k"], kept["hard_start_epoch"]) == (
        True,
        32,
        16,
        16,
        1,
    )
    state = torch.load(tmp_path / "checkpoint_0002.pth.tar", weights_only=True)
    assert len(state["state_dict"]["module.queue"]) == 16
    assert {name: state["run"]["flags"][name] for name in ("--auto", "--moco-k", "--batch-size", "--bn-splits")} == {
        "--auto": True, "--moco-k": 16, "--batch-size": 16, "--bn-splits": 2,
    }  # fmt: skip
    assert in_process(*words, "--resume", "auto", "--epochs", 20) == 0
    assert (
        "resumed with --epochs 20 (was 3), --schedule 12 16 (was 120 160), --moco-m 0.9" not in capsys.readouterr().err
    )
    assert len(torch.load(tmp_path / "checkpoint_0019.pth.tar", weights_only=True)["state_dict"]["module.queue"]) == 16


def test_two_processes_take_the_same(forty, tmp_path, start):
    program = start(*FEW, "--auto", "--nproc", 2, "--save-dir", tmp_path / "run", forty)
    assert program.end() == 0, program.text
    assert "2 processes" in program.text and "batch 16" in program.text
    assert program.text.count("--auto for 40 images of 40 px") == 1


def test_a_batch_above_the_set_names_auto(forty, tmp_path, in_process, capsys):
    assert in_process(*FEW, "--save-dir", tmp_path, forty) == 2
    assert capsys.readouterr().err == (
        "error: the data set has 40 images, fewer than one batch of 256; give a --batch-size of at most 40, or "
        "leave it to --auto.\n"
    )


def test_without_auto_nothing_but_sentences(forty, tmp_path, in_process, capsys):
    words = [*FEW, "-b", 8, "--size", 32, "--method", "synco", "--save-dir", tmp_path, forty]
    assert in_process(*words) == 0
    out = capsys.readouterr().out
    for said in (
        "the synthetic negatives never start, as this run ends after 15 steps (5 per epoch); give --hard-start-epoch 1",
        "the queue has 65536 rows for 40 images",
        "in 4 parts of 2 images",
        "--moco-m 0.999 leaves the key encoder 99 % of its first weights",
    ):
        assert out.count(said) == 1, said
    assert out.count("leave it to --auto") == 4
    flags = torch.load(tmp_path / "checkpoint_0002.pth.tar", weights_only=True)["run"]["flags"]
    assert (flags["--moco-k"], flags["--moco-m"], flags["--hard-start-epoch"]) == (65536, 0.999, 10)


def test_no_torch():
    code = "import sys, moco.train.fit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
