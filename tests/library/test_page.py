"""docs/library.md is a session that runs, in this process and with a small network."""

import re
from pathlib import Path

import torch
from conftest import ROOT
from support import here

PAGE = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")


def test_the_blocks_of_the_page_run_one_after_another(image_folder, tmp_path, monkeypatch, alone, restored, capsys):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    Path("my_images").symlink_to(image_folder)
    here.run_here(monkeypatch, here.SMALL)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.S):
        exec(compile(block, "docs/library.md", "exec"), names)
    out = capsys.readouterr().out
    for block in re.findall(r"```text\n(.*?)```", PAGE, flags=re.S):
        assert block in out
