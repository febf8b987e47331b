"""The loss as other processors would compute it, see machines.py."""

import os
import subprocess
import sys

import pytest
from support.machines import FUSED, HEART, HERE, LESSER, NUMBERS, PART, name_of, run


@pytest.mark.slow
@pytest.mark.parametrize("setting", LESSER, ids=name_of)
def test_the_loss_keeps_its_bounds_on(setting):
    for child in (run(setting, HEART), run({**setting, "TRITON_INTERPRET": "1"}, FUSED, "-k", PART)):
        assert child.returncode == 0, child.stdout[-5000:] + child.stderr[-2000:]
        assert "[100%]" in child.stdout


def test_torch_follows_a_setting_and_all_tests_are_there():
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() in ("DEFAULT", "NO AVX")
    assert all((HERE / name.split("::")[0]).is_file() for name in NUMBERS)
