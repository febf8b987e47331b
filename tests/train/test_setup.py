"""What a pretraining says before its first step, line by line."""

import re

import pytest
import torch
from conftest import SYNCO, TINY
from torch import nn

from moco.data import EpochSampler
from moco.models.batchnorm import trains_on
from moco.models.moco import MoCo
from moco.train.fit import queue_warning


def test_the_first_lines_of_a_log_in_their_order(image_folder, tmp_path, in_process, capsys, monkeypatch):
    words = [*TINY, *SYNCO, "--moco-k", 48, "--warmup-epochs", 9, "--steps", 1, "--save-dir", tmp_path, image_folder]
    assert in_process(*words) == 0
    capsys.readouterr()
    monkeypatch.setattr(MoCo, "slow_reason", lambda *_: "slow on purpose")
    assert in_process(*words, "--resume", "auto", "--lr", "0.02", "--knn-every", 0) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = (
        r"synco, test_resnet at \d+ px, \d+ images of .*, seed \d+",
        r"24 training images in 2 classes \(folders\), \d+ held out \(val/\), colour 8-bit \d+x\d+",
        r"one process on cpu, batch \d+, 0 loader workers each, amp \w+",
        r"loss by cpu in .*",
        r"synthetic negatives per query, .*",
        r"warning: the synthetic negatives never start, .*",
        r"warning: the queue has 48 rows for 24 images: each image is in it 2 times, .*; give --moco-k 8, or leave it "
        r"to --auto\.",
        r"warning: BatchNorm sees a batch of 8 in 4 parts of 2 images, .*: give --bn-splits 2, or leave it to --auto\.",
        r"warning: --moco-m 0.999 leaves the key encoder 100 % of its first weights at the end of 1 step: .*",
        r"resumed with --lr 0.02 .*",
        "online probe: a linear classifier of 2 classes beside the training, which it does not change",
        r"from epoch 0, step 1 of 1 \(.*checkpoint_0000_step_00000001.pth.tar\)",
        "slow on purpose",
        "no k-NN accuracy: switched off by --knn-every 0",
        "the run is finished: .*",
        "written: .*report.html",
        r"finished: loss \d\.\d+ of chance; next: moco lincls --pretrained .*",
    )
    assert len(lines) == len(expected), lines
    assert [line for line, form in zip(lines, expected, strict=True) if not re.fullmatch(form, line)] == []


@pytest.mark.parametrize(
    ("K", "images", "said"),
    [(0, 5, ""), (500, 500, ""),
     (65536, 500, "131 times, the oldest keys are 1024 steps old, .* give --moco-k 128, or"),
     (501, 500, "in it 1 times, the oldest keys are 7 steps .* --moco-k 128, or"),
     (9, 1, "9 times, .* --moco-k 1, or")],
)  # fmt: skip
def test_a_queue_with_more_rows_than_images_is_warned_of(K, images, said):
    assert re.search(said, queue_warning(K, images, 64))
    assert bool(queue_warning(K, images, 64)) == bool(said)


@pytest.mark.parametrize(("n", "batch", "world", "drop_last", "fewest"), [
    (9, 4, 1, True, 4), (9, 4, 1, False, 1), (9, 4, 2, False, 1), (10, 4, 2, False, 1), (11, 4, 2, False, 2),
    (8, 4, 2, False, 2), (8, 2, 2, True, 1), (3, 8, 1, False, 3),
])  # fmt: skip
def test_the_smallest_step_of_an_epoch(n, batch, world, drop_last, fewest):
    sampler = EpochSampler(n, batch, 0, world, drop_last=drop_last)
    assert sampler.fewest == fewest
    assert min(len(keys) for keys in sampler) == fewest


def test_batchnorm_needs_two_values_a_channel():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, stride=8), nn.BatchNorm2d(4))
    assert [trains_on(network, images, 3, 8) for images in (1, 2)] == [False, True]
    assert trains_on(network, 1, 3, 16)  # four values
    assert not network[1].running_mean.any()
    assert network[1].running_mean.device.type == "cpu"


def test_a_last_step_of_one_image_is_answered_before_the_first(image_folder, tmp_path, in_process, capsys):
    words = [*TINY, "-b", 23, "--no-drop-last", "--stem", "imagenet", "--save-dir", tmp_path, image_folder]
    assert in_process(*words) == 2
    assert capsys.readouterr().err == (
        "error: 24 images in batches of 23 leave a step with one image per process, too few for BatchNorm: choose "
        "another --batch-size, or leave out --no-drop-last.\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_name_is_not_utf8(image_folder, tmp_path, in_process, capsys):
    folder = tmp_path / "\udcff\x1b[31m"
    words = [*TINY, "--steps", 1, "--save-dir", folder, image_folder]
    assert in_process(*words) == 0
    assert in_process(*words, "--resume", "auto", "--steps", 2) == 0
    printed = capsys.readouterr().out
    assert len(list((folder / "tensorboard" / "log").iterdir())) == 2
    assert r"\udcff\x1b[31m/checkpoint_0000_step_00000001.pth.tar" in printed
    assert (folder / "checkpoint_0000_step_00000002.pth.tar").is_file()


def test_want_of_memory_is_a_sentence(image_folder, tmp_path, in_process, capsys, monkeypatch):
    words = [*TINY, "--steps", 1, "--save-dir", tmp_path, image_folder]
    assert in_process(*words, "--size", 2_000_000_000) == 75
    assert capsys.readouterr().err.startswith("error: out of memory; lower --batch-size, --size, --moco-k or --workers")

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(MoCo, "forward", fail)
    assert in_process(*words) == 75
    assert "(CUDA out of memory.)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [RuntimeError("Too many open files. Communication with the workers .."), OSError(24, "Too many open files")],
)
def test_a_limit_of_open_files_is_a_sentence(error, image_folder, tmp_path, in_process, capsys, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(MoCo, "forward", fail)
    assert in_process(*TINY, "--steps", 1, "--save-dir", tmp_path, image_folder) == 2
    assert capsys.readouterr().err == (
        "error: too many open files; raise the limit (ulimit -n 65536) or lower --workers.\n"
    )


@pytest.mark.parametrize(("variables", "flags", "word"), [
    ({"RANK": "zero", "WORLD_SIZE": "2"}, [], "'zero'"),
    ({"SLURM_STEP_NUM_TASKS": "2(x3)", "SLURM_PROCID": "0"}, [], "'2(x3)'"),
    ({"PMI_RANK": "0", "PMI_SIZE": "two"}, [], "'two'"),
    ({}, ["--world-size", 2, "--rank", 0, "--dist-url", "tcp://[nowhere"], "Invalid IPv6 URL"),
])  # fmt: skip
def test_what_a_scheduler_says_is_no_number(
    variables, flags, word, image_folder, tmp_path, in_process, capsys, monkeypatch
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert in_process(*TINY, *flags, "--save-dir", tmp_path, image_folder) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --dist-url, or a scheduler's variable")
    assert word in error
