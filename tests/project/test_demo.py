"""`make demo`, shorter: the same commands, three epochs; what it prints is true and better than before."""

import json
import sys
from pathlib import Path

import pytest
from conftest import records, run_script
from PIL import Image

from moco import cli
from moco import demo as door
from moco.eval import demo


@pytest.mark.slow
@pytest.mark.usefixtures("alone", "restored")
def test_the_demo_learns_and_shows_it(tmp_path, monkeypatch, capsys):
    def run(command, check):
        assert (command[0], check) == (sys.executable, False)
        done = run_script(tmp_path, Path(command[1]), *command[2:])
        print(done.stdout, done.stderr)
        return done

    monkeypatch.setattr(demo.subprocess, "run", run)  # processes all the same, see run_script
    code = door.main(["--epochs", "3", "--save-dir", str(tmp_path)])
    said = capsys.readouterr().out
    assert code == 0, said[-3000:]
    found = {
        (when, name): json.loads((tmp_path / when / file).read_text())[name]
        for when in ("untrained", "pretrained")
        for name, file in (("knn", "knn.json"), ("acc1", "result.json"))
    }
    assert found["pretrained", "knn"] > found["untrained", "knn"] + 8
    assert found["pretrained", "acc1"] > found["untrained", "acc1"] + 8
    last = said.splitlines()[-8:]
    for value in found.values():
        assert f"{value:.1f} %" in "\n".join(last)
    picture = tmp_path / "embedding.png"
    assert str(picture) in "\n".join(last)
    with Image.open(picture) as image:
        assert image.width > 1000
    lines = records(tmp_path)
    (knn,) = [r["knn"] for r in lines if "knn" in r]
    assert knn == pytest.approx(found["pretrained", "knn"], abs=1.5)  # bf16 where the CPU has it, fp32 in the probe


def test_a_whole_demo_says_what_to_expect(tmp_path):
    for when, knn, acc1 in (("untrained", 55.1, 52.8), ("pretrained", 93.9, 95.7)):
        (tmp_path / when).mkdir()
        (tmp_path / when / "knn.json").write_text(json.dumps({"knn": knn}))
        (tmp_path / when / "result.json").write_text(json.dumps({"acc1": acc1}))
    last = demo.results_table(str(tmp_path)).splitlines()[-1]
    assert last.split(maxsplit=1) == ["expected", "92 to 96.5 %, 94 to 97.5 %, by processor"]
    assert "expected" not in demo.results_table(str(tmp_path), whole=False)
    for knn, acc1 in ((91.9, 95.7), (93.9, 97.6)):
        assert demo.expected({"knn": knn, "acc1": acc1}).splitlines()[-1].startswith("warning: this run is outside")


def test_its_pretraining_is_what_main_pretrain_does_without_words():
    settings = cli.parse_pretrain([])
    assert settings.demo
    assert settings.save_dir == "runs/demo"
    knn, linear = demo.probes(settings, "x")
    assert "--knn" in knn
    assert cli.parse_lincls(linear[1:]).arch == settings.arch


def test_its_first_line_says_that_it_is_the_demo(tmp_path, in_process, capsys):
    assert in_process("--max-minutes", 0, "-j", 0, "--knn-every", 0, "--save-dir", tmp_path) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("the demo, as no DIR is given: synco, test_resnet at 28 px, 4000 images of ")
