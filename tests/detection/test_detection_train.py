"""Detection with the real detectron2 on a CPU: tiny VOC and COCO trees, from a MoCo checkpoint to AP."""

from __future__ import annotations

import json
import logging
import pickle
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, records, save_pretrained
from torch import nn

from detection import needs, report, run, train_net
from moco.weights import detectron2_names

pytestmark = [
    pytest.mark.slow,
    # detectron2's and fvcore's own calls, with current torch and numpy
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
]
CONFIGS = ROOT / "detection" / "configs"
VOC, COCO = "configs/pascal_voc_R_50_C4_24k_moco.yaml", "configs/coco_R_50_FPN_1x_moco.yaml"
SMALL = [
    "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "3", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64",
    "DATALOADER.NUM_WORKERS", "0", "TEST.PRECISE_BN.NUM_ITER", "2", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "20",
    "MODEL.RPN.POST_NMS_TOPK_TEST", "4", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "4", "SEED", "1",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def datasets(tmp_path_factory) -> Iterator[Path]:
    """The trees, where detectron2 looks from its first import on; without detectron2 every test fails and says how."""
    root = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(root))
        needs.check()
        from support import detection_data

        detection_data.make_voc(root)
        detection_data.make_coco(root)
        yield root


@pytest.fixture(autouse=True)
def own_logs() -> Iterator[None]:
    """detectron2 adds a handler a folder and never takes one away."""
    yield
    from detectron2.utils.logger import setup_logger

    for name in ("detectron2", "fvcore"):
        for handler in list(logging.getLogger(name).handlers):
            logging.getLogger(name).removeHandler(handler)
            handler.close()
    setup_logger.cache_clear()


@pytest.fixture(scope="module")
def checkpoint(resnet50, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pretrained") / "checkpoint_0199.pth.tar"
    return save_pretrained(path, resnet50, "resnet50", epoch=200)


@pytest.fixture(scope="module")
def backbone(checkpoint) -> Path:
    path = checkpoint.with_name("r50.pkl")
    detectron2_names.write_pickle(detectron2_names.convert(str(checkpoint)), str(path))
    return path


def settings(config: str, *words: object):
    from detection import recipe

    return recipe.read_config(recipe.find_config(config), [*SMALL, *map(str, words)], num_gpus=0)[0]


def train(config: str, *words: object) -> int:
    return train_net.main(["--config-file", config, "--num-gpus", "0", *map(str, words)])


def refused(capsys, config: str, *words: object) -> str:
    """The one sentence with which train_net.py refuses."""
    capsys.readouterr()
    assert train(config, *words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


# ------------------------------------------------------------------------------------------------------ the backbone


def test_activations_of_the_converted_backbone_are_the_encoders(resnet50, backbone):
    """Bit for bit in eval mode: res2 to res5 of the FPN's ResNet, and the C4 head's res5."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    from detection.trainer import Res5ROIHeadsExtraNorm

    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected, h = {}, resnet50.maxpool(resnet50.relu(resnet50.bn1(resnet50.conv1(x))))
        for i in range(1, 5):
            expected[f"res{i + 1}"] = h = resnet50.get_submodule(f"layer{i}")(h)
        for config in (COCO, VOC):
            model = build_model(settings(config)).eval()
            DetectionCheckpointer(model).load(str(backbone))
            if config == COCO:
                found = model.backbone.bottom_up(x)
            else:
                assert isinstance(model.roi_heads, Res5ROIHeadsExtraNorm)
                *blocks, norm = model.roi_heads.res5
                assert (len(blocks), norm.num_features) == (3, 2048)
                found = model.backbone(x)
                found["res5"] = nn.Sequential(*blocks)(found["res4"])
            assert {"res4", "res5"} <= found.keys()
            assert all((found[name] - expected[name]).abs().max() == 0 for name in found)


# ---------------------------------------------------------------------------------------------------------- training


def test_voc_c4_trains_evaluates_and_resumes(backbone, tmp_path, capsys):
    words = [*SMALL, "MODEL.WEIGHTS", backbone, "OUTPUT_DIR", tmp_path]
    assert "--resume finds no last_checkpoint" in refused(capsys, VOC, "--resume", *words)
    assert train(VOC, *words, "SOLVER.MAX_ITER", 2) == 0
    assert "is 0.125 times the config's 16; linear scaling: SOLVER.BASE_LR 0.02 -> 0.0025" in capsys.readouterr().out
    assert train(VOC, "--resume", *words, "MODEL.WEIGHTS", tmp_path / "moved_away.pkl") == 0
    lines = records(tmp_path / "metrics.json")
    assert [r["iteration"] for r in lines if "total_loss" in r] == [1, 2]  # the last of each run; 0 and 1, then 2
    assert all(np.isfinite(r["total_loss"]) for r in lines if "total_loss" in r)
    assert json.loads((tmp_path / "results.json").read_text()).keys() == {"bbox"}
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert state["iteration"] == 2 and state["trainer"]["_trainer"]["optimizer"]["state"]
    assert "roi_heads.res5.norm.weight" in state["model"]

    # a detector is evaluated whole: a backbone alone is refused, the trained file is not
    assert "lacks proposal_generator." in refused(capsys, VOC, "--eval-only", *words)
    (tmp_path / "results.json").unlink()
    assert train(VOC, "--eval-only", *words, "MODEL.WEIGHTS", tmp_path / "model_final.pth") == 0
    assert set(json.loads((tmp_path / "results.json").read_text())["bbox"]) == {"AP", "AP50", "AP75"}


def test_coco_fpn_trains_and_evaluates_boxes_and_masks(backbone, tmp_path):
    assert train(COCO, *SMALL, "MODEL.WEIGHTS", backbone, "OUTPUT_DIR", tmp_path) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.keys() == {"bbox", "segm"}
    assert all({"AP", "AP50", "AP75"} <= found.keys() for found in results.values())
    assert all(0 <= value <= 100 for found in results.values() for value in found.values())


def test_run_goes_from_a_checkpoint_to_a_row_and_continues(checkpoint, tmp_path, capsys, monkeypatch):
    begun: list[list[str]] = []

    def in_this_process(command: list[str]) -> int:
        assert command[:2] == [sys.executable, str(ROOT / "detection" / "train_net.py")]
        begun.append(command[2:])
        return train_net.main(command[2:])

    monkeypatch.setattr(run.signals, "call", in_this_process)
    small = [*SMALL, "SOLVER.MAX_ITER", "1"]
    own = tmp_path / "own.pth.tar"
    images = {"mean": [0.5, 0.4, 0.2], "std": [0.229, 0.224, 0.225]}
    torch.save({**torch.load(checkpoint, weights_only=True), "run": {"images": images}}, own)
    words = [str(own), "--task", "voc", "--trials", "2", "--pictures", "1", "--out", str(tmp_path), *small]
    assert run.main(words) == 0
    assert [w[w.index("SEED", -6) + 1] for w in begun] == ["0", "1"]
    assert all(w[w.index("MODEL.PIXEL_MEAN") + 1] == "[127.5, 102.0, 51.0]" for w in begun)
    said = capsys.readouterr().out
    assert f"images are normalised as {own} was trained: MODEL.PIXEL_MEAN [127.5" in said
    made = json.loads((tmp_path / "summary.json").read_text())
    each = [json.loads((tmp_path / f"trial_{i}" / "results.json").read_text())["bbox"]["AP50"] for i in range(2)]
    assert made["AP50"] == {"mean": sum(each) / 2, "std": abs(each[0] - each[1]) / 2**0.5, "trials": each}
    assert (tmp_path / "table.md").read_text() in said
    assert [p.suffix for p in (tmp_path / "pictures").iterdir()] == [".png"]

    (tmp_path / "trial_1" / "results.json").unlink()  # as if cut before its evaluation
    assert run.main(words) == 0
    assert len(begun) == 3 and "--resume" in begun[2] and str(tmp_path / "trial_1") in begun[2]
    assert json.loads((tmp_path / "summary.json").read_text()) == made

    (tmp_path / "trial_0" / "results.json").unlink()
    monkeypatch.setattr(run.signals, "call", lambda command: 7)
    assert run.main(words) == 1
    assert "trial_0 ended with code 7, see its log.txt" in capsys.readouterr().err

    assert run.main([*words, "SOLVER.BASE_LR", "0.1"]) == 2
    assert "holds results of another checkpoint or of other settings" in capsys.readouterr().err
    assert len(begun) == 3


# ---------------------------------------------------------------------------------------------------------- measures


def instances(one: dict, keep: bool):
    """Ground truth as predictions with score 1, or none."""
    from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

    objects = one["annotations"] if keep else []
    boxes = []
    for found in objects:
        left, top, third, fourth = found["bbox"]
        wide = found["bbox_mode"].name == "XYWH_ABS"
        boxes.append([left, top, left + third, top + fourth] if wide else [left, top, third, fourth])
    made = Instances((one["height"], one["width"]))
    made.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    made.scores = torch.ones(len(objects))
    made.pred_classes = torch.tensor([found["category_id"] for found in objects], dtype=torch.long)
    if "segmentation" in one["annotations"][0]:
        outlines = PolygonMasks([found["segmentation"] for found in objects])
        made.pred_masks = BitMasks.from_polygon_masks(outlines, one["height"], one["width"]).tensor
    return made


@pytest.mark.parametrize(("config", "kinds"), [(VOC, {"bbox"}), (COCO, {"bbox", "segm"})])
@pytest.mark.parametrize(("keep", "expected"), [(True, 100), (False, 0)])
def test_perfect_predictions_score_100_and_none_score_0(config, kinds, keep, expected, tmp_path):
    from detectron2.data import DatasetCatalog

    from detection.trainer import Trainer

    cfg = settings(config)
    name = cfg.DATASETS.TEST[0]
    evaluator = Trainer.build_evaluator(cfg, name, str(tmp_path))
    evaluator.reset()
    for one in DatasetCatalog.get(name):
        evaluator.process([one], [{"instances": instances(one, keep)}])
    results = evaluator.evaluate()
    assert results is not None and results.keys() == kinds
    for found in results.values():
        assert [found[m] for m in ("AP", "AP50", "AP75")] == pytest.approx([expected] * 3)


def test_summary_and_table():
    trials = [
        {"bbox": {"AP50": a, "AP": a / 2, "AP75": 1.0}, "segm": {"AP50": 2.0, "AP": 1.0, "AP75": a}} for a in (80, 84)
    ]
    found = report.summary(trials)
    assert list(found) == ["AP50", "AP", "AP75", "mask AP50", "mask AP", "mask AP75"]
    assert found["AP50"] == {"mean": 82, "std": pytest.approx(8**0.5), "trials": [80, 84]}
    boxes = {name: found[name] for name in ("AP50", "AP", "AP75")}
    table = report.table(boxes, "mine", 2, "pascal_voc_R_50_C4_24k_moco").splitlines()
    assert table[-1] == "| mine | 2 | 82.0 ± 2.8 | 41.0 ± 1.4 | 1.0 ± 0.0 |"
    assert "| MoCo v2, 200 epochs (published) | 5 | 82.4 | 57.0 | 63.6 |" in table
    assert len(report.table(boxes, "mine", 2, "pascal_voc_R_50_C4_12k_moco").splitlines()) == 3  # 12k has no such rows


# ---------------------------------------------------------------------------------------------------------- settings

VOC_SIZES, COCO_SIZES = tuple(range(480, 801, 32)), tuple(range(640, 801, 32))
RECIPES = {  # images a step, iterations, steps, warm-up, sizes, masks
    "pascal_voc_R_50_C4_12k": (12_000, (9_000, 11_000), 100, VOC_SIZES, False),
    "pascal_voc_R_50_C4_24k": (24_000, (18_000, 22_000), 100, VOC_SIZES, False),
    "coco_R_50_C4_1x": (90_000, (60_000, 80_000), 1000, COCO_SIZES, True),
    "coco_R_50_C4_2x": (180_000, (120_000, 160_000), 1000, COCO_SIZES, True),
    "coco_R_50_FPN_1x": (90_000, (60_000, 80_000), 1000, COCO_SIZES, True),
}


def test_every_config_is_its_published_recipe():
    from detection import recipe

    files = [path for path in sorted(CONFIGS.glob("*.yaml")) if not path.name.startswith("Base")]
    assert len(files) == 4 * 5 + 4
    for path in files:
        cfg, said = recipe.read_config(str(path), [], num_gpus=0)
        name, method = re.fullmatch(r"(.*?_(?:12k|24k|1x|2x))_?(.*)", path.stem).groups()  # type: ignore[union-attr]
        schedule = (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS, cfg.INPUT.MIN_SIZE_TRAIN)
        assert (*schedule, cfg.MODEL.MASK_ON) == RECIPES[name] and said == [], path.name
        assert pytest.approx(0.01 if method == "synco_lr0.01" else 0.02) == cfg.SOLVER.BASE_LR
        assert (cfg.SOLVER.IMS_PER_BATCH, cfg.INPUT.MIN_SIZE_TEST, cfg.MODEL.BACKBONE.FREEZE_AT) == (16, 800, 0)
        assert cfg.TEST.PRECISE_BN.ENABLED and cfg.TEST.PRECISE_BN.NUM_ITER == 200
        assert (cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeadsExtraNorm") == ("_C4_" in name)
        ours = (cfg.INPUT.FORMAT, cfg.MODEL.RESNETS.STRIDE_IN_1X1, round(cfg.MODEL.PIXEL_STD[0])) == ("RGB", False, 58)
        assert ours == bool(method)  # the supervised ones keep what detectron2's own weights were made with


def test_a_smaller_batch_scales_rate_and_schedule_but_not_what_was_given():
    from detection import recipe

    path = recipe.find_config(VOC)
    cfg, said = recipe.read_config(path, ["SOLVER.IMS_PER_BATCH", "8"], num_gpus=0)
    solver = cfg.SOLVER
    assert (solver.BASE_LR, solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS) == (0.01, 48_000, (36_000, 44_000), 200)
    assert len(said) == 1 and "0.5 times the config's 16" in said[0]
    cfg, _ = recipe.read_config(path, ["SOLVER.IMS_PER_BATCH", "8", "SOLVER.BASE_LR", "0.03"], num_gpus=0)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (0.03, 48_000)
    cfg, said = recipe.read_config(path, ["SOLVER.IMS_PER_BATCH", "8"], num_gpus=0, scale=False)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, said) == (0.02, 24_000, [])
    cfg, _ = recipe.read_config(path, ["SOLVER.MAX_ITER", "7"], num_gpus=0)
    assert cfg.TEST.PRECISE_BN.NUM_ITER == 7  # no more batches than were trained on


# ------------------------------------------------------------------------------------------------------------ faults


def test_wrong_weights_are_refused_before_anything_is_built(checkpoint, backbone, tmp_path, capsys):
    assert "MODEL.WEIGHTS names no file" in refused(capsys, VOC)
    assert "convert a checkpoint by" in refused(capsys, VOC, "MODEL.WEIGHTS", checkpoint)
    words = ["MODEL.WEIGHTS", backbone, "OUTPUT_DIR", tmp_path / "none"]
    deep = refused(capsys, COCO, "MODEL.RESNETS.DEPTH", 101, *words)
    assert "lacks backbone.bottom_up.res4.6.conv1.weight" in deep and "and 150 more" in deep
    state = detectron2_names.convert(str(checkpoint))
    detectron2_names.write_pickle(
        {**state, "res4.6.conv1.weight": state["res4.5.conv1.weight"]}, str(tmp_path / "deeper.pkl")
    )
    assert "has besides res4.6.conv1.weight" in refused(capsys, VOC, "MODEL.WEIGHTS", tmp_path / "deeper.pkl")
    detectron2_names.write_pickle(
        {n: v for n, v in state.items() if not n.startswith("res5.1")}, str(tmp_path / "part.pkl")
    )
    assert "lacks roi_heads.res5.1.conv1.weight" in refused(capsys, VOC, "MODEL.WEIGHTS", tmp_path / "part.pkl")
    assert not (tmp_path / "none").exists()


def test_data_that_is_not_there_is_a_sentence(datasets, backbone, tmp_path, capsys):
    words = ["MODEL.WEIGHTS", backbone, "OUTPUT_DIR", tmp_path]
    for config, path in (
        (VOC, "VOC2012/ImageSets/Main/trainval.txt"),
        (VOC, "VOC2007/Annotations/000005.xml"),
        (VOC, "VOC2007/JPEGImages/000002.jpg"),
        (COCO, "coco/annotations/instances_val2017.json"),
        (COCO, "coco/train2017"),
    ):
        (datasets / path).rename(tmp_path / "hidden")
        said = refused(capsys, config, *words)
        assert f"{datasets / path} is missing" in said and "set DETECTRON2_DATASETS" in said
        (tmp_path / "hidden").rename(datasets / path)
    assert "no data set voc_1999" in refused(capsys, VOC, *words, "DATASETS.TEST", "('voc_1999',)")
    lvis = refused(capsys, COCO, *words, "DATASETS.TEST", "('lvis_v1_val',)")
    assert "only pascal_voc and coco are known here" in lvis


def test_wrong_words_are_a_sentence(capsys, tmp_path, checkpoint):
    assert "no config file at nowhere.yaml" in refused(capsys, "nowhere.yaml")
    assert "Non-existent key: SOLVER.LR" in refused(capsys, VOC, "SOLVER.LR", 1)
    assert "--num-gpus 99 is more than the" in refused(capsys, VOC, "--num-gpus", 99)
    capsys.readouterr()
    for words, said in (
        (["--task", "voc", "--backbone", "FPN"], "there is no recipe for --task voc"),
        (["--task", "voc", "--trials", "0"], "--trials 0 runs nothing"),
    ):
        assert run.main([str(checkpoint), *words, "--out", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err
    assert run.main([str(tmp_path / "nothing"), "--task", "coco", "--out", str(tmp_path / "out")]) == 2
    assert "no checkpoint at" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "command"), [("cv2", "'.[detection]'"), ("detectron2.engine", "git+https://")])
def test_what_is_not_installed_is_named_with_its_command(name, command, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    assert command in refused(capsys, VOC)
    assert run.main(["x", "--task", "voc"]) == 2


def test_the_two_lists_of_needs_agree():
    listed = (ROOT / "detection" / "requirements.txt").read_text().splitlines()
    block = re.search(r"^detection = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.S | re.M)
    assert block
    assert re.findall(r'"(.*)"', block.group(1)) == [line for line in listed if not line.startswith("#")]


def test_commands_of_the_readme_name_files_and_flags_that_exist():
    from detection import recipe

    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "detection" / "README.md").read_text(), flags=re.S)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    runs = [words[3:] for words in commands if words[:3] == ["python", "-m", "detection.run"]]
    for args in map(run.parse, runs):
        assert recipe.find_config(run.config_name(args.task, args.schedule, args.backbone, args.method))
    trained = [words[2:] for words in commands if words[1] == "detection/train_net.py"]
    for args in map(train_net.parse, trained):
        recipe.read_config(recipe.find_config(args.config_file), args.opts, num_gpus=0)
    assert (len(runs), len(trained)) == (2, 2)
    files = [word for words in commands for word in words if word.startswith("detection/")]
    assert files and all((ROOT / file).is_file() for file in files)


def test_settings_travel_to_other_processes():
    """train_net.py hands them to one process a GPU."""
    cfg = settings(VOC)
    assert pickle.loads(pickle.dumps(cfg)) == cfg
