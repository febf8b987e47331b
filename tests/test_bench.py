"""`python -m moco.bench`: every part is measured and named, and the advice follows from the numbers."""

import functools
import re

import pytest
from conftest import SYNCO, TINY

from moco import bench, options
from moco.bench import table, verdict

QUICK = ["--bench-steps", "2", "--bench-images", "4", "--bench-seconds", "0.05"]
STEP = {"q forward", "q backward", "k forward", "shuffle", "head", "optimizer", "EMA", "enqueue", "transfer", "other"}


@pytest.fixture
def measured(in_process, capsys):
    """``measured(*words)``: what the command printed; ``in_process`` guards this process's settings."""

    def run(*words: object) -> str:
        assert bench.main([*map(str, words)]) == 0
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


def test_synthetic_negatives_are_active_although_they_start_late(image_folder, in_process, monkeypatch):
    made = []
    original = bench.make_trainer

    def watch(*given):
        made.append(original(*given))
        return made[-1]

    monkeypatch.setattr(bench, "make_trainer", watch)
    words = [*TINY, *SYNCO, "--warmup-epochs", "30", "--type-starts", "mixup=40", *QUICK]
    assert bench.main(["step", str(image_folder), *words]) == 0
    assert float(made[0].last.synthetic_mass) > 0
    assert made[0].progress.epoch == 40
    assert made[0].progress.step == bench.WARM_UP + 2


def two(args) -> int:
    for name, value in {"what": "step", "bench_steps": 2, "bench_images": 4, "bench_seconds": 0.05}.items():
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
        "exact_head": True}  # fmt: skip


def parts(**seconds: float) -> dict[str, float]:
    return {"q backward": 0.1, "head": 0.01, "other": 9.0, **seconds}


@pytest.mark.parametrize(
    ("given", "used", "words"),
    [
        (parts(), USED, r"q backward \(1 %\): try --compile\."),
        (parts(), {**USED, "amp": False}, r"try --amp auto --compile\."),
        (parts(), {**USED, "compile": True}, r"only a smaller -a or --size is faster"),
        (parts(), {**USED, "gpu": False}, r"only a smaller -a or --size is faster"),
        (parts(head=0.2), USED, r"head \(2 %\): try --head-precision bf16"),
        (parts(head=0.2), {**USED, "exact_head": False}, r"fewer synthetic negatives or --moco-k"),
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
    assert loader == "In the loader the most goes to augment: try -j 16 (now 2)."
    assert both == "The bottleneck is the loader: loader 100 images/s, step 128."
    *_, both = verdict({**loads, "loader": 200.0}, {"head": 0.5}, 64, {**USED, "gpu": False})
    assert both.startswith("The bottleneck is the step: loader 200 images/s, step 128; on a CPU they share the cores")
    (_, loader, _) = verdict(loads, {"head": 0.5}, 64, {**USED, "workers": 16})
    assert "all 16 cores load already" in loader


def test_a_table():
    lines = ["| x | ms | share |", "| --- | ---: | ---: |", "| a | 1500 | 75.0 % |", "| b | 500 | 25.0 % |"]
    assert table("x", {"a": 1.5, "b": 0.5}) == "\n".join(lines)
    assert table("x", {"a": 1.5}, share=False) == "| x | ms |\n| --- | ---: |\n| a | 1500 |"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["everything"], "invalid choice: 'everything'"),
        (["step", "--bench-steps", "0"], "--bench-steps must be above 0"),
        (["step", "--no-such-flag"], "--no-such-flag"),
        (["data", "nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_sentence(words, sentence, capsys, in_process):
    try:
        code = bench.main(words)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


def test_its_own_flags_do_not_shadow_those_of_a_run():
    mine = {w for a in options.bench_parser()._actions for w in a.option_strings} - {"-h", "--help"}
    theirs = {w for a in options.pretrain_parser()._actions for w in a.option_strings}
    assert not mine & theirs
