"""A run in a process of its own: what ends it, and what it leaves of the caller's."""

import io
import json
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext

import pytest
from conftest import environment, load, wait_until

from moco import cli, errors
from moco.errors import MocoError, OutageError, TrainingError, UserError
from moco.library import child


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        (2, UserError, "no such folder."),
        (3, TrainingError, "it diverged."),
        (75, OutageError, "the disk is gone."),
        (137, OutageError, "a process was ended by signal 9; go on."),
        (-9, OutageError, ""),
        (-11, OutageError, ""),
        (1, MocoError, "Traceback:\n  File\nValueError: odd\n"),
        (1, MocoError, ""),
        (3, TrainingError, ""),
    ],
    ids=str,
)
def test_an_end_is_an_error_with_its_sentence(code, kind, said):
    reports = json.dumps(said) + "\n" if said else ""
    with pytest.raises(kind) as raised:
        child._answer(code, reports)
    assert type(raised.value) is kind
    text = str(raised.value)
    if kind is MocoError:
        assert text == f"the run's process failed: {'ValueError: odd' if said else 'its output says why'}"
        assert (raised.value.__cause__ is not None) == bool(said)
    elif said:
        assert text == said
    else:
        assert text.endswith(".")
        assert ("memory" in text) == (code == -9)


@pytest.mark.parametrize("code", [0, 129, 143])
def test_a_run_that_is_done_or_was_stopped_raises_nothing(code):
    assert child._answer(code, "") == code


def test_ctrl_c_stays_one():
    with pytest.raises(KeyboardInterrupt):
        child._answer(130, "")


def test_a_crash_is_an_error_whose_cause_is_the_traceback(capsys):
    with pytest.raises(
        MocoError, match="^the run's process failed: AttributeError: .*'json' has no attribute"
    ) as raised:
        child.run("json:nothing", Namespace())
    assert 'File "' in str(raised.value.__cause__)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("variables", "how"),
    [
        ({}, ""),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ""),
        ({"RANK": "none", "WORLD_SIZE": "2"}, ""),  # the start of the run refuses it
        ({"RANK": "0", "WORLD_SIZE": "2"}, "torchrun"),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}, "SLURM"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_of_several_callers_is_refused(variables, how):
    child.check_alone(cli.parse_pretrain(["DIR", "--nproc", "2"]), variables)
    args = cli.parse_pretrain(["DIR"])
    with pytest.raises(UserError, match=f"processes that {how} has started") if how else nullcontext():
        child.check_alone(args, variables)


def test_whatever_ends_the_function_ends_the_run(monkeypatch):
    """Such as what a signal handler of the caller raises."""
    begun = []

    def fails(process, *_):
        begun.append(process)
        if len(begun) == 1:
            raise LookupError("of the caller")

    monkeypatch.setattr(child, "_relay", fails)
    with pytest.raises(LookupError, match="of the caller"):
        child.run("time:sleep", Namespace())
    assert begun[0].returncode is not None


SCRIPT = """
import os, signal, sys, threading, time
import moco

handlers, variables = [signal.getsignal(number) for number in range(1, 32)], dict(os.environ)

def run(**more):
    moco.pretrain(sys.argv[1], "run", arch="test_resnet", size=16, batch_size=8, moco_k=20, moco_dim=16, workers=0,
                  amp="off", seed=3, knn_every=0, keep=1, epochs=10**6, **more)

def interrupt():
    while not os.path.exists("run/latest"):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt).start()
try:
    run()
except KeyboardInterrupt:
    print("interrupted", *sorted(os.listdir("run")), flush=True)
assert [signal.getsignal(number) for number in range(1, 32)] == handlers
assert dict(os.environ) == variables
assert "torch" not in sys.modules
threading.Thread(target=run, kwargs={"resume": "auto"}).start()
"""


@pytest.mark.dist
@pytest.mark.slow
def test_a_script_is_interrupted_goes_on_in_a_thread_and_is_killed(image_folder, tmp_path):
    """It has no guard and comes from standard input. Ctrl-C leaves a checkpoint and is still Ctrl-C, what is the
    script's own is as it was, and the run does not outlive the script."""
    with subprocess.Popen(
        [sys.executable, "-", str(image_folder)], env=environment(), cwd=tmp_path, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as script:  # fmt: skip
        assert script.stdin and script.stdout and script.stderr
        script.stdin.write(SCRIPT)
        script.stdin.close()
        said = iter(script.stdout)
        try:
            files = next(line for line in said if line.startswith("interrupted")).split()
            assert next((line for line in said if line.startswith("resumed") or "Epoch" in line), ""), (
                script.stderr.read()
            )
            wait_until((tmp_path / "run" / "owner.json").exists)
            owner = json.loads((tmp_path / "run" / "owner.json").read_text())
        finally:
            script.kill()
        assert "Traceback" not in script.stderr.read()
    assert "latest" in files
    assert "owner.json" not in files
    assert owner["pid"] != script.pid
    wait_until(lambda: not (tmp_path / "run" / "owner.json").exists(), "the run goes on without its caller")
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    saved = load(tmp_path / "run")["run"]["step"]
    assert saved >= records[-1]["step"]


@pytest.mark.parametrize("stream", [None, io.StringIO()], ids=["none", "closed"])
def test_a_caller_without_an_output_is_no_failure(stream, monkeypatch):
    if stream is not None:
        stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    errors.write_out("a line of the run", sys.stdout)
    errors.tell("a line")
