"""`python -m moco.bench`: every part is measured and named, and the advice follows from the numbers."""

import functools
import math
import re
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import SYNCO, TINY
from PIL import Image
from support.refused import one_sentence

from moco import bench as bench_door
from moco import cli
from moco.cli import commands
from moco.cli.pretrain import pretrain_config
from moco.data.sources.decode import decode_bytes
from moco.models.in_batch import BatchContrast
from moco.train import bench
from moco.train.bench import timing_table, verdict

QUICK = ["--bench-steps", "2", "--bench-images", "4", "--bench-seconds", "0.05"]
STEP = {"q forward", "q backward", "k forward", "shuffle", "head", "optimizer", "EMA", "enqueue", "transfer", "other"}
BATCH = STEP - {"k forward", "shuffle", "EMA", "enqueue"}
NO_QUEUE = [word for word in TINY if word not in ("--moco-k", "20")]


@pytest.fixture
def measured(in_process, capsys):
    """``measured(*words)``: what the command printed; ``in_process`` guards this process's settings."""

    def run(*words: object) -> str:
        assert bench_door.main([*map(str, words)]) == 0
        return capsys.readouterr().out

    return run


def rows(text: str) -> dict[str, list[str]]:
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    return {name: others for name, *others in cells if name != "---"}


def test_all_names_every_part_and_the_bottleneck(measured, image_folder):
    text = measured("all", image_folder, *TINY, *SYNCO, *QUICK)
    found = rows(text)
    assert STEP | {"decode", "crop", "augment"} <= set(found)
    assert {"synco, cpu in bf16", "synco, cpu in fp32"} & set(found)
    assert "synco, in fp32" in found
    assert sum(float(found[name][1].split()[0]) for name in STEP) == pytest.approx(100, abs=1)
    step, loader = (float(re.search(rf"{word} (\d+)", text).group(1)) for word in ("step", "loader"))  # type: ignore
    slower = "loader" if loader < step else "step"
    assert f"The bottleneck is the {slower}: loader {loader:.0f} images/s, step {step:.0f}" in text
    assert len(re.findall(r"\d images/s$", text, re.M)) == 1


@pytest.mark.parametrize(("what", "absent"), [("data", "q forward"), ("step", "decode"), ("head", "decode")])
def test_one_part_alone(what, absent, measured, image_folder):
    found = rows(measured(what, image_folder, *TINY, *QUICK))
    assert found
    assert absent not in found


@pytest.mark.parametrize("method", ["simclr", "supcon", "hcl", "dcl"])
def test_a_method_without_a_queue_is_measured_by_its_own_parts(method, measured, image_folder):
    text = measured("all", image_folder, *NO_QUEUE, "--method", method, *QUICK)
    found = rows(text)
    assert set(found) - {"part of a step", "per image of two views, one process", "the loss alone"} == {
        *BATCH, "decode", "crop", "augment", f"{method}, in fp32"
    }  # fmt: skip
    assert text.startswith(f"{method}, test_resnet at 16 px, batch 8, no queue, ")
    assert "Most of the step's time goes to " in text
    assert "shuffle" not in text


def test_supcon_with_a_queue_is_measured_beside_plain_moco(measured, image_folder):
    found = rows(measured("all", image_folder, *TINY, *SYNCO, "--method", "supcon", *QUICK))
    assert set(found) > STEP
    assert "supcon with a queue, in fp32" in found
    assert [name for name in found if name.startswith("plain moco, cpu in ")]


def test_the_loss_alone_is_that_of_the_step(image_folder, in_process):
    """The features that stand in for the encoder's reach the run's own forward, and its gradient reaches them."""
    words = [*NO_QUEUE, "--method", "simclr", "--temp", "0.5", "--base-temperature", "0.5", str(image_folder)]
    args = commands.parse_bench(["head", *words])
    view = bench.view_settings(args.settings.views, bench.data.open_sources(path=str(image_folder)).pretrain)
    model, _ = bench.build_model(args.settings, view, 0, 100, 8)
    ((z, loss),) = bench._head_of_batch(args, model, 8).values()  # pyright: ignore[reportArgumentType]
    unit = torch.nn.functional.normalize(z.detach(), dim=1)
    terms = []
    for i in range(16):
        s = [float(unit[i] @ unit[j]) / 0.5 for j in range(16)]
        others = sum(math.exp(x) for j, x in enumerate(s) if j != i)
        terms.append(math.log(others) - s[(i + 8) % 16])
    assert float(loss().detach()) == pytest.approx(sum(terms) / 16, rel=1e-5)
    loss().backward()
    assert z.grad is not None and bool((z.grad != 0).any(1).all())


def test_the_step_takes_the_flags_of_the_optimizer(image_folder, in_process, monkeypatch):
    made, original = [], bench.make_trainer
    monkeypatch.setattr(bench, "make_trainer", lambda *given: made.append(original(*given)) or made[-1])
    words = [*TINY, "--opt", "adamw", "--ema", "0.5", "--clip-grad", "1", *QUICK]
    assert bench_door.main(["step", str(image_folder), *words]) == 0
    assert type(made[0].optimizer).__name__ == "AdamW"
    q, average = (made[0].model.get_submodule(name).state_dict() for name in ("encoder_q", "encoder_ema"))
    moved = [name for name in q if not torch.equal(q[name], average[name])]
    assert moved


def test_views_that_the_device_finishes_are_a_part_of_the_step(measured, image_folder, monkeypatch):
    finished = []
    original = bench.data.Finishing.__iter__
    monkeypatch.setattr(
        bench.data.Finishing, "__iter__", lambda self: (finished.append(b["q"]) or b for b in original(self))
    )
    text = measured("all", image_folder, *TINY, "--aug-device", "gpu", "--aug-plus", *QUICK)
    found = rows(text)
    assert STEP | {"augmentation", "decode", "crop"} <= set(found)
    assert "augment" not in found
    assert len(finished) == bench.WARM_UP + 2  # steps; the loader is watched without them
    assert finished[0].shape == (8, 3, 16, 16)
    assert finished[0].dtype == torch.uint8
    raw = next(bench.noise(8, Namespace(channels=3, size=16), 3, torch.device("cpu")))["q"]
    assert not (finished[0] == raw).flatten(1).all(1).any()


def test_more_views_are_loaded_finished_and_compared(measured, image_folder, monkeypatch):
    seen = []
    original = BatchContrast.forward

    def forward(self, views, ids, *where):
        seen.append((len(views), *views[-1].shape))
        return original(self, views, ids, *where)

    monkeypatch.setattr(BatchContrast, "forward", forward)
    words = ["--method", "simclr", "--views", 4, "--aug-device", "gpu", "--aug-plus"]
    found = rows(measured("all", image_folder, *NO_QUEUE, *words, *QUICK))
    assert {"per image of 4 views, one process", "augmentation", "simclr, in fp32"} <= set(found)
    assert set(seen) == {(4, 8, 3, 16, 16), (4, 8, 1, 1, 1)}


@pytest.fixture
def photographs(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(6):
        small = Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8))
        small.resize((400, 300)).save(tmp_path / f"{i}.jpg")
    (tmp_path / "6.jpg").write_bytes(b"\xff\xd8 no picture")
    return tmp_path


def test_fast_decoding_is_measured_with_its_crops_and_advised(measured, photographs, monkeypatch):
    words = ["data", photographs, *TINY, "--size", 112, "-b", 4, *QUICK, "--bench-images", 7]
    text = measured(*words)
    assert set(rows(text)) >= {"decode", "crop", "augment"}
    seen, original = [], bench.data.two_views
    monkeypatch.setattr(bench.data, "two_views", lambda *given: seen.append(given) or original(*given))
    text = measured(*words, "--decode", "fast")
    assert set(rows(text)) >= {"decode and crop", "augment"}
    assert "decode" not in rows(text)
    assert (seen[0][0].crop_only, seen[0][0].fast) == (False, True)


def test_synthetic_negatives_are_active_although_they_start_late(image_folder, in_process, monkeypatch):
    made = []
    original = bench.make_trainer

    def watch(*given):
        made.append(original(*given))
        return made[-1]

    monkeypatch.setattr(bench, "make_trainer", watch)
    words = [*TINY, *SYNCO, "--warmup-epochs", "30", "--type-starts", "mixup=40", "noise=500steps", *QUICK]
    assert bench_door.main(["step", str(image_folder), *words]) == 0
    assert float(made[0].last.statistics["synthetic_mass"]) > 0
    assert made[0].progress.epoch == 40
    assert made[0].progress.step == 500 + bench.WARM_UP + 2


def test_what_is_slow_is_said_as_a_run_says_it(measured, image_folder, monkeypatch):
    monkeypatch.setattr(bench.MoCo, "slow_reason", lambda *_: "slow on purpose")
    assert measured("step", image_folder, *TINY, *QUICK).count("slow on purpose\n") == 1


def two(args) -> int:
    given = {"what": "step", "bench_steps": 2, "bench_images": 4, "bench_seconds": 0.05}
    for name, value in {**given, "settings": pretrain_config(args)}.items():
        setattr(args, name, value)
    return bench.worker(args)


@pytest.mark.dist
def test_two_processes_print_once(image_folder, start):
    program = start(*TINY, "--nproc", 2, image_folder, main=functools.partial(two))
    assert program.end() == 0, program.text
    assert program.text.count("| q backward |") == 1
    assert "2 processes (gloo) on cpu" in program.text


# ---------------------------------------------------------------------------------------------------- advice


USED = {"gpu": True, "workers": 2, "cores": 16, "amp": True, "channels_last": True, "compile": False,
        "exact_head": True, "queue": True, "fast_decode": False, "cache": False}  # fmt: skip


def parts(**seconds: float) -> dict[str, float]:
    return {"q backward": 0.1, "head": 0.01, "other": 9.0, **seconds}


@pytest.mark.parametrize(
    ("given", "used", "words"),
    [
        (parts(), USED, r"q backward \(1 %\): try --compile\."),
        (parts(), {**USED, "amp": False}, r"try --amp auto --compile\."),
        (parts(), {**USED, "compile": True}, r"only a smaller -a or --size is faster"),
        (parts(), {**USED, "gpu": False}, r"try --compile\."),
        (parts(head=0.2), USED, r"head \(2 %\): try --head-precision bf16"),
        (parts(head=0.2), {**USED, "exact_head": False}, r"fewer synthetic negatives or --moco-k"),
        (parts(head=0.2), {**USED, "exact_head": False, "queue": False}, r"it grows with the square of the batch"),
        (parts(augmentation=0.2), USED, r"augmentation \(2 %\): --aug-device cpu leaves it"),
        (parts(EMA=0.2), USED, r"EMA \(2 %\): a larger --batch-size"),
        (parts(shuffle=0.2), USED, r"shuffle \(2 %\): more images a process"),
    ],
)
def test_advice_about_the_step(given, used, words):
    (line,) = verdict({}, given, 64, used)
    assert re.search(words, line)


def test_advice_about_the_loader_and_the_bottleneck():
    loads = {"decode": 0.002, "crop": 0.001, "augment": 0.004, "loader": 100.0}
    step, loader, both = verdict(loads, {"head": 0.5}, 64, USED)
    assert "head (100 %)" in step
    assert loader == "Most of the loader's time goes to augment: try -j 16 (now 2)."
    assert both == "The bottleneck is the loader: loader 100 images/s, step 128."
    *_, both = verdict({**loads, "loader": 200.0}, {"head": 0.5}, 64, {**USED, "gpu": False})
    assert both.startswith("The bottleneck is the step: loader 200 images/s, step 128; on a CPU they share the cores")
    (_, loader, _) = verdict(loads, {"head": 0.5}, 64, {**USED, "workers": 16})
    assert (
        loader
        == "Most of the loader's time goes to augment: try --aug-device gpu (now cpu), which finishes the views there."
    )
    (loader,) = verdict({**loads, "decode": 0.1}, {}, 64, {**USED, "workers": 16, "fast_decode": True})
    assert loader == "Most of the loader's time goes to decode: try --decode fast (now exact)."
    (loader,) = verdict({**loads, "decode": 0.1}, {}, 64, {**USED, "workers": 16, "fast_decode": True, "cache": True})
    assert loader.endswith("to decode: try --cache DIR (now none), which keeps the decoded images in a file.")
    (loader,) = verdict({**loads, "decode": 0.1}, {}, 64, {**USED, "workers": 16})
    assert "all 16 cores load already" in loader


def test_a_folder_without_a_readable_image_is_one_sentence(tmp_path, in_process, capsys):
    (tmp_path / "0.jpg").write_bytes(b"\xff\xd8 no picture")
    assert bench_door.main(["data", str(tmp_path), *TINY, *QUICK]) == 2
    error = capsys.readouterr().err
    assert "none of 1 images tried in" in error
    assert error.count("\n") == 1


def test_a_cache_is_advised_where_it_would_help(image_folder, tmp_path, measured, monkeypatch):
    monkeypatch.setattr("moco.train.bench.distributed.cores", lambda: 0)  # all of them load already
    monkeypatch.setattr("moco.data.sources.base.decode_bytes", functools.partial(slowly, decode_bytes))
    words = [image_folder, *TINY, *QUICK]
    assert "time goes to decode: try --cache DIR" in measured("data", *words)
    assert "--cache" not in measured("data", *words, "--cache", tmp_path / "kept")
    monkeypatch.setattr("moco.data.sources.cache.LIMIT", 10_000)
    assert "--cache" not in measured("data", *words)


def slowly(function, *arguments, **options):
    time.sleep(0.01)
    return function(*arguments, **options)


def test_a_table():
    lines = ["| x | ms | share |", "| --- | ---: | ---: |", "| a | 1500 | 75.0 % |", "| b | 500 | 25.0 % |"]
    assert timing_table("x", {"a": 1.5, "b": 0.5}) == "\n".join(lines)
    assert timing_table("x", {"a": 1.5}, share=False) == "| x | ms |\n| --- | ---: |\n| a | 1500 |"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["everything"], "invalid choice: 'everything'"),
        (["step", "--bench-steps", "0"], "--bench-steps must be at least 1, not 0"),
        (["data", "--bench-seconds", "inf"], "--bench-seconds must be a number above 0, not inf"),
        (["step", "--no-such-flag"], "--no-such-flag"),
        (["data", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_sentence(words, sentence, capsys, in_process):
    assert sentence in one_sentence(bench_door.main, capsys, words)


def test_its_own_flags_do_not_shadow_those_of_a_run():
    mine = {w for a in commands.bench_parser()._actions for w in a.option_strings} - {"-h", "--help"}
    theirs = {w for a in cli.pretrain_parser()._actions for w in a.option_strings}
    assert not mine & theirs
