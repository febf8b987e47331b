"""What the demo says. A short one runs from end to end in test_wheel.py, which is beside the checkout."""

import json

from moco import cli
from moco.eval import demo


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
    assert in_process("--max-minutes", 0, "-j", 0, "--knn-every", 0, "--save-dir", tmp_path) == 75
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("the demo, as no DIR is given: synco, test_resnet at 28 px, 4000 images of ")
