"""What the console shows now and then, and the last line of a run."""

import json
import os
import re
import shlex
import signal
import sys

import pytest
from conftest import TINY, records, wait_until

from moco import cli, doors, signals
from moco.train.ending import SLOW_LOADER, Reached, Told, last_line
from moco.train.pretraining import Trainer


def test_times_are_told_at_epochs_that_double_at_every_tenth_and_the_last():
    told, seen = Told(), []
    for epochs in range(1, 36):
        told.report()
        if told.times(epochs, 0.1, epochs == 35):
            seen.append(epochs)
    assert seen == [1, 2, 4, 8, 10, 16, 20, 30, 32, 35]


def test_times_wait_for_a_loss_and_a_slow_loader_is_told_once():
    told = Told()
    assert not told.times(1, 0.0, False)
    told.report()
    assert told.times(3, 0.0, False)  # what epoch 1 could not tell
    shares, seen = [0.0, SLOW_LOADER + 0.01, 0.9, 0.9, 0.1, 0.9], []
    for epochs, share in enumerate(shares, 100):
        told.report()
        seen.append(told.times(epochs + 101, share, False))
    assert seen == [False, True, False, False, False, False]  # at the end: it has not been well in between, as told
    assert told.saved(False)
    assert not told.saved(False)
    assert told.saved(True)


def reached(*records: dict) -> Reached:
    found = Reached()
    for record in records:
        found.note(record)
    return found


@pytest.mark.parametrize(
    ("records", "text", "now"),
    [([], "", ""),
     ([{"epoch": 0, "loss": 5.0, "loss_ratio": 0.9, "images_per_second": 99.6}, {"epoch": 0, "knn": 60.0},
       {"epoch": 1, "knn": 70.123}, {"epoch": 2, "knn": 65.0, "loss_ratio": None}],
      "k-NN 65.00 % (best 70.12 % in epoch 1), loss 0.900 of chance", "loss 5.0000, k-NN 65.00 %, 100 images/s"),
     ([{"epoch": 0, "val_acc1/lr30": 40.0, "val_acc1/lr3": 50.0, "best_acc1/lr3": 99.0}], "Acc@1 50.00 %",
      "Acc@1 50.00 %"),
     ([{"epoch": 4, "test_acc1": 40, "online_val_acc1": 90}], "Acc@1 40.00 %", "Acc@1 40.00 %"),
     ([{"epoch": None, "knn": "x", "loss_ratio": [1]}], "", "")],
)  # fmt: skip
def test_what_was_reached(records, text, now):
    assert (reached(*records).text(), reached(*records).now()) == (text, now)


def test_the_last_line():
    assert last_line("k-NN 1 %", "finished", "", "moco x") == "finished: k-NN 1 %; next: moco x"
    assert last_line("", "finished", "", "") == "finished"
    assert last_line("k-NN 1 %", "signal SIGUSR1", "after 1 of 2 steps of epoch 3", "moco y") == (
        "stopped after 1 of 2 steps of epoch 3 by SIGUSR1: k-NN 1 %; continue with moco y"
    )
    assert (
        last_line("", "max-minutes", "", "")
        == "stopped after the last step by --max-minutes; continue with --resume auto"
    )


# -------------------------------------------------------------------------------------------- what to type next

TYPED = {  # argv[0], whether by -m moco, and how lincls and embed are then typed
    "main_pretrain.py": ("python main_lincls.py", "python -m moco.embed"),
    "/a b/main_pretrain.py": ("python '/a b/main_lincls.py'", "python -m moco.embed"),
    "/bin/moco": ("moco lincls", "moco embed"),
    "/bin/moco-pretrain": ("moco-lincls", "moco embed"),
    "/x/moco/__main__.py": ("python -m moco lincls", "python -m moco embed"),
}


@pytest.fixture
def typed(monkeypatch):
    """``typed(*words)``: they are this process's command line."""

    def type_(*words: object) -> None:
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        monkeypatch.setattr(sys, "executable", "python")  # which is no path: as it was typed

    return type_


@pytest.mark.parametrize("program", TYPED)
def test_the_next_command_is_typed_as_the_last_one_was(program, typed, monkeypatch):
    more = ["pretrain"] if program in ("/bin/moco", "/x/moco/__main__.py") else []
    typed(program, *more, "my images", "--overwrite", "--resume=x", "--lr", 1, "--resume", "auto", "-b", 8)
    own = {"main_pretrain.py": "python main_pretrain.py", "/bin/moco": "moco pretrain",
           "/bin/moco-pretrain": "moco-pretrain"}  # fmt: skip
    if program in own:
        assert doors.again() == f"{own[program]} 'my images' --lr 1 -b 8 --resume auto"
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
        again = program if program.endswith(".py") else "-m moco pretrain"
        assert doors.again().startswith(f"torchrun --nproc-per-node 4 {again} 'my images'")
        monkeypatch.delenv("TORCHELASTIC_RUN_ID")
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
        assert doors.again().startswith(f"srun {own[program]} ")
    lincls, embed = TYPED[program]
    assert doors.beside("lincls", ["x y"]) == f"{lincls} 'x y'"
    assert doors.beside("embed", ["x"]) == f"{embed} x"


def test_what_a_shell_does_not_find_by_its_name_is_typed_with_its_path(typed, tmp_path, monkeypatch):
    active, other = tmp_path / "active", tmp_path / "my env"
    for folder in (active, other):
        folder.mkdir()
        for name in ("python", "python3", "moco", "moco-pretrain"):
            (folder / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(active))
    for folder, path in ((active, ""), (other, f"{other}/")):
        for name in ("moco", "moco-pretrain"):
            typed(folder / name, *["pretrain"] * (name == "moco"), "DIR")
            own = "moco pretrain" if name == "moco" else name
            first, *more = shlex.split(doors.again())
            assert (first, shlex.join(more)) == (f"{path}{name}", f"{own} DIR --resume auto".removeprefix(f"{name} "))
            assert shlex.split(doors.beside("embed", ["x"])) == [f"{path}moco", "embed", "x"]
        typed("main_pretrain.py", "--", "DIR")
        monkeypatch.setattr(sys, "executable", str(folder / "python3"))
        found = shlex.split(doors.again())
        assert found == [f"{path}python3", "main_pretrain.py", "--resume", "auto", "--", "DIR"]
        assert shlex.split(doors.beside("lincls", []))[:2] == [f"{path}python3", "main_lincls.py"]


@pytest.mark.parametrize("labelled", [True, False])
def test_what_a_run_says_to_type_next_can_be_typed(labelled, image_folder, tmp_path, in_process, typed, capsys):
    """First the rest of a run that was stopped, then the probe of its encoder, or without labels its features."""
    import main_lincls
    from moco import embed

    folder = image_folder if labelled else image_folder / "train"
    words = [*TINY, "--epochs", 1, "--knn-every", 1, "--knn-k", 3, "--save-dir", tmp_path / "run", folder]
    typed("main_pretrain.py", *words)
    assert in_process(*words, "--max-minutes", 0) == 75
    program, script, *again = shlex.split(capsys.readouterr().out.splitlines()[-1].partition("continue with ")[2])
    assert (program, script) == ("python", "main_pretrain.py")
    assert in_process(*again) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.match(r"finished: (k-NN \d+\.\d\d %, )?loss \d\.\d+ of chance; next: ", last)
    assert ("k-NN" in last) == labelled
    found = shlex.split(last.partition("; next: ")[2])
    if labelled:
        assert found[:2] == ["python", "main_lincls.py"]
        assert main_lincls.worker(cli.parse_lincls([*found[2:], "--epochs", "1", "-j", "0"])) == 0
        assert (tmp_path / "run_lincls" / "result.json").exists()
        last = capsys.readouterr().out.splitlines()[-1]
        assert re.match(r"finished: Acc@1 \d+\.\d\d %; next: python -m moco.report ", last)
    else:
        assert found[:3] == ["python", "-m", "moco.embed"]
        assert embed.main([*found[3:], "-j", "0", "--picture", "none"]) == 0
        assert (tmp_path / "run" / "features" / "features.npz").exists()
    events = [json.loads(line) for line in (tmp_path / "run" / "log_events.jsonl").read_text().splitlines()]
    assert [e.get("exit_code") for e in events if e["kind"] == "end"] == [75, 0]


@pytest.mark.parametrize(("came", "name", "code"), [(["SIGUSR1"] * 2, "SIGUSR1", 75),
                                                    (["SIGTERM", "SIGUSR1"], "SIGTERM", 143)])  # fmt: skip
def test_signals_in_the_last_step(came, name, code, image_folder, tmp_path, in_process, monkeypatch, capsys):
    """The measurements of the last epoch are left: the same command makes them, and finishes the run."""
    step = Trainer.step

    def signalled(self, batches) -> None:
        if self.progress.step == 2 and not signals.noted():
            for sent, number in enumerate(came, 1):
                os.kill(os.getpid(), signal.Signals[number])
                wait_until(lambda sent=sent: len(signals.noted()) == sent)
        step(self, batches)

    monkeypatch.setattr(Trainer, "step", signalled)
    words = [*TINY, "--epochs", 1, "--knn-every", 1, "--knn-k", 3, "--save-dir", tmp_path, image_folder]
    assert [in_process(*words), in_process(*words, "--resume", "auto")] == [code, 0]
    stopped, finished = (line for line in capsys.readouterr().out.splitlines() if line.startswith(("stopped", "finis")))
    assert re.fullmatch(rf"stopped after the last step by {name}: loss .*; continue with --resume auto", stopped)
    assert finished.startswith("finished: k-NN ")
    ends = [event for event in records(tmp_path / "log_events.jsonl") if event["kind"] == "end"]
    assert [(e["reason"], e["exit_code"], e["step"]) for e in ends] == [(f"signal {name}", code, 3), ("finished", 0, 3)]
