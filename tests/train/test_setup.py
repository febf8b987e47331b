"""What a pretraining says before its first step, line by line."""

import re

from conftest import SYNCO, TINY

from moco.models.moco import MoCo


def test_the_first_lines_of_a_log_in_their_order(image_folder, tmp_path, in_process, capsys, monkeypatch):
    words = [*TINY, *SYNCO, "--warmup-epochs", 9, "--steps", 1, "--save-dir", tmp_path, image_folder]
    assert in_process(*words) == 0
    capsys.readouterr()
    monkeypatch.setattr(MoCo, "slow_reason", lambda *_: "slow on purpose")
    assert in_process(*words, "--resume", "auto", "--lr", "0.02", "--knn-every", 0) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = (
        r"synco, test_resnet at \d+ px, \d+ images of .*, seed \d+",
        r"one process on cpu, batch \d+, 0 loader workers each, amp \w+",
        r"loss by cpu in .*",
        r"synthetic negatives per query, .*",
        r"warning: the synthetic negatives never start, .*",
        r"resumed with --lr 0.02 .*",
        r"from epoch 0, step 1 of 1 \(.*checkpoint_0000_step_00000001.pth.tar\)",
        "slow on purpose",
        "no k-NN accuracy: switched off by --knn-every 0",
        "the run is finished: .*",
    )
    assert len(lines) == len(expected), lines
    assert [line for line, form in zip(lines, expected, strict=True) if not re.fullmatch(form, line)] == []
