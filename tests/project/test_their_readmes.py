"""The lines of the READMEs of SupContrast, SupCon-Framework, MoCHi's public code, SynCo and BEiT-3, behind --compat.

Each is run to its end as it is typed there, with the project's own spelling and order, and tiny sizes behind it; the
data sets with a name have two dozen images, and a path that a README leaves open is filled in.
"""

import shlex

import numpy as np
import pytest
import torch
from conftest import load, records, save_pretrained

import main_lincls
import main_pretrain
import main_semisup
from moco import average, cli, distributed
from moco.data.sources import named
from moco.data.sources.base import ArraySource
from moco.models.encoder import build_encoder

MAINS = {
    "main_pretrain.py": (main_pretrain.worker, cli.parse_pretrain),
    "main_lincls.py": (main_lincls.worker, cli.parse_lincls),
    "main_semisup.py": (main_semisup.worker, cli.parse_semisup),
}
SMALL = "-j 0 --epochs 1 --size 16"


def few(name):
    """What stands for a data set: 24 images of 16 pixels, of ten classes."""

    def read(directory, download, channels):
        pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
        labels, classes = np.arange(24) % 10, [str(number) for number in range(10)]
        seen.append((name, directory, download))
        sources = [ArraySource(f"{name}/{half}", pixels, channels, classes, labels) for half in ("train", "test")]
        return sources[0], *sources

    seen: list[tuple] = []
    return read, seen


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the lines of a project are typed, one after another."""
    return tmp_path_factory.mktemp("typed")


@pytest.fixture
def typed(folder, monkeypatch, alone, restored):
    """``typed(line, more)``: runs a line, with what makes it small behind it; its settings."""
    torch.set_num_threads(1)
    monkeypatch.chdir(folder)
    seen = {}
    for name in ("cifar10", "caltech256"):
        read, seen[name] = few(name)
        monkeypatch.setattr(named, name, read)

    def run(line, more):
        script, *words = shlex.split(line)
        worker, parse = MAINS[script]
        args = parse([*words, *more.split()])
        assert distributed.launch(worker, args) == 0
        return args

    run.seen = seen
    return run


PRETRAINED = "save/SupCon/cifar10_models/{}_cifar10_test_resnet_lr_0.5_decay_0.0001_bsz_8_temp_{}_trial_0_cosine"


@pytest.mark.parametrize(
    ("line", "method", "temperature", "syncbn"),
    [
        ("--batch_size 1024 --learning_rate 0.5 --temp 0.1 --cosine", "SupCon", 0.1, False),
        ("--batch_size 1024 --learning_rate 0.5 --temp 0.5 --cosine --syncBN --method SimCLR", "SimCLR", 0.5, True),
    ],
)
def test_supcontrasts_pretraining(typed, folder, line, method, temperature, syncbn):
    args = typed(
        f"main_pretrain.py --compat supcontrast {line}",
        f"--model test_resnet --stem imagenet {SMALL} -b 8 --knn-every 0",
    )
    assert typed.seen["cifar10"] == [("cifar10", "./datasets/", True)]
    assert (args.method, args.lr, args.moco_t, args.sync_bn) == (method.lower(), 0.5, temperature, syncbn)
    run = folder / PRETRAINED.format(method, temperature)
    flags = load(run)["run"]["flags"]
    wanted = {"--method": method.lower(), "--arch": "test_resnet", "--aug": "supcon", "--cos": True,
              "--wd": 1e-4, "--min-lr": 5e-4, "--moco-t": temperature, "--base-temperature": 0.07}  # fmt: skip
    assert {name: flags[name] for name in wanted} == wanted
    assert records(run)[0]["step"] == 3


def test_supcontrasts_probe(typed, folder):
    """After the pretraining above, whose folder stands for /path/to/model.pth."""
    run = PRETRAINED.format("SupCon", 0.1)
    line = f"main_lincls.py --compat supcontrast --batch_size 512 --learning_rate 5 --ckpt {run}"
    args = typed(line, f"{SMALL} -b 8")
    assert (args.lrs, args.schedule, args.lr_decay_rate, args.weight_decay) == ([5.0], [60, 75, 90], 0.2, 0.0)
    assert list(folder.glob("save/SupCon/cifar10_linear/cifar10_resnet50_lr_5.0_decay_0.0_bsz_8/checkpoint*"))


def test_a_forks_probe_on_folders(typed, image_folder):
    run = PRETRAINED.format("SupCon", 0.1)
    line = f"main_lincls.py --compat supcontrast --batch_size 26 --batch_size_val 26 --learning_rate 1 --ckpt {run}"
    args = typed(f"{line} --train_folder {image_folder}/train --test_folder {image_folder}/val --num_classes 2",
                 f"{SMALL} -b 8")  # fmt: skip
    assert (args.dataset, args.val_data, typed.seen["cifar10"]) == ("folder", f"{image_folder}/val", [])


def test_supcontrasts_cross_entropy(typed, folder):
    line = "main_semisup.py --compat supcontrast --batch_size 1024 --learning_rate 0.8 --cosine --syncBN"
    args = typed(line, f"--model test_resnet --stem imagenet {SMALL} -b 8")
    assert (args.lr_backbone, args.lr_classifier, args.weight_decay, args.min_lr) == (0.8, 0.8, 1e-4, 8e-4)
    assert (args.aug, args.save_ckpt_freq) == ("supcon jitter_p=0 grey_p=0", 50)
    assert list(folder.glob("save/SupCon/cifar10_models/SupCE_cifar10_test_resnet_lr_0.8*_trial_0_cosine/result.json"))


def test_supcontrasts_custom_data_set(typed, image_folder):
    pixels = '--mean "(0.4914, 0.4822, 0.4465)" --std "(0.2675, 0.2565, 0.2761)"'
    line = f"main_pretrain.py --compat supcontrast --batch_size 1024 --learning_rate 0.5 --temp 0.1 --cosine {pixels}"
    args = typed(f"{line} --dataset path --data_folder {image_folder}/train --method SimCLR",
                 f"--model test_resnet --stem imagenet {SMALL} -b 8 --knn-every 0")  # fmt: skip
    assert (args.dataset, args.mean, typed.seen["cifar10"]) == ("folder", [0.4914, 0.4822, 0.4465], [])


FIRST, SECOND = (f"configs/train/train_supcon_resnet18_cifar10_stage{stage}.yml" for stage in (1, 2))


def test_supcon_frameworks_two_stages_and_their_averages(typed, folder):
    """Its README's lines one after another, by the names that they have there: each reads what the one before wrote."""
    small = f"-a test_resnet {SMALL} --amp off -b 8"
    args = typed(f"main_pretrain.py --compat supcon-framework --config_name {FIRST}",
                 f"{small} --epochs 3 --knn-every 1")  # fmt: skip
    assert (args.method, args.moco_t, args.lr, args.momentum, args.min_lr) == ("supcon", 0.1, 0.1, 0.0, 0.01)
    assert (args.ema_epoch, args.aug) == (0.3, "supcon crop_scale=0.15,1 jitter_p=0.9 flip_p=0")
    assert typed.seen["cifar10"] == [("cifar10", "data/cifar10", True)]
    first = "weights/supcon_first_stage_cifar10"
    assert average.main([first, "--best", "3", "--out", f"{first}/swa", "--no-refresh"]) == 0
    line = f"main_lincls.py --compat supcon-framework --config_name {SECOND}"
    args = typed(line, f"{small} --epochs 3")
    assert (args.pretrained, args.lrs, args.label_smoothing, args.features) == (f"{first}/swa", [0.01], 0.01, "cached")
    second = "weights/supcon_second_stage_cifar10"
    assert average.main([second, "--best", "3", "--out", f"{second}/swa", "--no-refresh"]) == 0
    args = typed(f"main_semisup.py --compat supcon-framework --config_name {SECOND}", f"{small} --save-dir tuned")
    assert (args.weights, args.ema_epoch, args.lr_classifier) == ("freeze", 0.3, 0.01)


def test_supcon_frameworks_learning_rate_finder(typed, folder):
    name = "configs/train/lr_finder_supcon_resnet18_cifar10_stage2.yml"
    args = typed(
        f"main_lincls.py --compat supcon-framework --config_name {name}",
        f"-a test_resnet {SMALL} -b 8 --lr-find-steps 10 --save-dir found",
    )
    assert (args.lr_find, args.lrs, args.label_smoothing) == (True, [0.001], 0.0)
    assert (folder / "found" / "lr_find.csv").is_file()


@pytest.mark.parametrize(
    "line",
    [
        "--dir_data there --dir_out long --img_size 16 --steps 6 --batch_size 8 --steps_save 3 --steps_print 1 "
        "--seed 1 --lr_base 1e-3 --lr_warmup 1e-5 --lr_min 1e-6 --clip_grad 1 --arch test_resnet --dim_moco 16 "
        "--k_moco 40 --m_moco 0.9 --t_moco 0.2 --n_hard 8 --s1_hard 4 --s2_hard 2 --start1_hard 1 --start2_hard 3",
        "-dd there -do short -i 16 -s 6 -bs 8 -ss 3 -sp 1 -se 1 -lrb 1e-3 -lrw 1e-5 -lrm 1e-6 -cg 1 -a test_resnet "
        "-dm 16 -km 40 -mm 0.9 -tm 0.2 -nh 8 -s1h 4 -s2h 2 -st1h 1 -st2h 3",
    ],
    ids=["long", "short"],
)
def test_mochis_options(typed, folder, line):
    """All but --device and --resume."""
    args = typed(f"main_pretrain.py --compat mochi {line}", "-j 0 --knn-every 0")
    assert typed.seen["caltech256"] == [("caltech256", "there", True)]
    assert args.type_start_steps == {"mixup": 2, "interpolation": 4}
    flags = load(folder / args.save_dir)["run"]["flags"]
    wanted = {"--arch": "timm/test_resnet", "--size": 16, "--steps": 6, "--batch-size": 8, "--lr": 1e-3,
              "--opt": "adamw", "--wd": 0.01, "--min-lr": 1e-6, "--clip-grad": 1.0, "--moco-dim": 16,
              "--moco-k": 40, "--moco-m": 0.9, "--moco-t": 0.2, "--mochi": [8, 4, 2],
              "--exclude-bias-norm": True, "--cos": True}  # fmt: skip
    assert {name: flags[name] for name in wanted} == wanted


SYNCO = "--dist-url tcp://localhost:10001 --world-size 1 --rank 0"


def test_syncos_pretraining(typed, folder, image_folder):
    line = "-a resnet50 --lr 0.03 --batch-size 256 --mlp --moco-t 0.2 --aug-plus --cos --n-hard 1024 --n1 256 --n2 256"
    more = f"-a test_resnet {SMALL} -b 8 --moco-k 64 --n-hard 16 --n1 4 --n2 4 --n3 4 --n4 2 --n5 2 --n6 2"
    args = typed(f"main_pretrain.py --compat synco {line} --n3 256 --n4 64 --n5 64 --n6 64 {image_folder}",
                 f"{more} --knn-every 0 --warmup-epochs 0 --save-dir synco")  # fmt: skip
    assert (args.method, args.hard_start_epoch, args.mask_same_image) == ("synco", 0, False)
    assert load(folder / "synco")["run"]["flags"]["synthetic negatives"] == "synco"


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("--lr-backbone 0.01 --lr-classifier 0.5 --train-percent 100 --weights finetune --batch-size 256",
         ("finetune", 0.01, 0.5)),
        ("", ("freeze", 0.0, 0.3)),
    ],
    ids=["readme", "defaults"],
)  # fmt: skip
def test_syncos_tuning(typed, tmp_path, image_folder, line, wanted):
    path = save_pretrained(tmp_path / "checkpoint_0199.pth.tar", build_encoder("test_resnet", 10))
    line = f"main_semisup.py --compat synco -a test_resnet {line} --pretrained {path} {image_folder}"
    args = typed(line, f"{SMALL} -b 8 --save-dir {tmp_path / 'tuned'}")
    assert (args.weights, args.lr_backbone, args.lr_classifier) == wanted
    assert (tmp_path / "tuned" / "result.json").is_file()


def test_syncos_probe(typed, tmp_path, image_folder):
    path = save_pretrained(tmp_path / "checkpoint_0199.pth.tar", build_encoder("test_resnet", 10))
    line = f"main_lincls.py --compat synco -a test_resnet --batch-size 256 --pretrained {path} {image_folder}"
    args = typed(line, f"{SMALL} -b 8 --save-dir {tmp_path / 'probe'}")
    assert (args.lrs, args.schedule, args.weight_decay) == ([0.03], [60, 80], 0.0)


def test_beit3s_line(typed, tmp_path, image_folder):
    path = save_pretrained(tmp_path / "checkpoint_0199.pth.tar", build_encoder("test_resnet", 10))
    line = f"main_semisup.py --compat schane --model test_resnet --task imagenet --data_path {image_folder}"
    args = typed(f"{line} --finetune {path} --sentencepiece_model beit3.spm --log_dir log --dist_eval",
                 f"--output_dir {tmp_path / 'tuned'} {SMALL} -b 8 --warmup_epochs 0")  # fmt: skip
    assert (args.opt, args.weight_decay, args.smoothing, args.aa) == ("adamw", 0.05, 0.1, "rand-m9-mstd0.5-inc1")
