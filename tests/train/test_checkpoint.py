"""Checkpoint files: what cannot be used is one sentence, and no kill and no full disk costs the previous file."""

import errno
import io
import multiprocessing
import os
import pickle
import random
import resource
import time
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from conftest import differences
from torch import nn

from moco import files, run_folder
from moco.config import MoCoConfig
from moco.errors import UserError
from moco.models.moco import MoCo
from moco.train import checkpoint

# ----------------------------------------------------------------------------------------------- files to refuse


class Attack:
    """Unpickling this without care would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def refused(path) -> str:
    with pytest.raises(UserError) as error:
        files.read(str(path))
    sentence = str(error.value)
    assert str(path) in sentence
    assert "\n" not in sentence
    return sentence


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.pth.tar"
    files.write({"epoch": 1, "state_dict": {"a": torch.arange(5000.0)}}, str(path))
    return path


def test_a_missing_file(tmp_path):
    assert "no checkpoint at" in refused(tmp_path / "nothing")
    assert "no checkpoint at" in refused(tmp_path)  # a folder


@pytest.mark.parametrize("content", [b"", b"hello, I am no checkpoint\n", b"\x80\x02}q\x00.", bytes(1000)])
def test_another_kind_of_file(content, tmp_path):
    path = tmp_path / "odd"
    path.write_bytes(content)
    sentence = refused(path) if content[:1] != b"\x80" else ""
    if sentence:
        assert "no readable checkpoint" in sentence
    else:
        with pytest.raises(UserError, match="odd"):  # a plain pickle of {} may be read; then it has no state
            checkpoint.unpack(files.read(str(path)), str(path), None, None, None, "a")


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.95, 0.999])
def test_a_truncated_file(share, good):
    whole = good.read_bytes()
    good.write_bytes(whole[: int(share * len(whole))])
    assert "truncated" in refused(good)


def test_a_malicious_file_runs_nothing(tmp_path):
    target = tmp_path / "owned"
    for name, save in (("zip", torch.save), ("plain", lambda x, p: p.write_bytes(pickle.dumps(x, 2)))):
        path = tmp_path / name
        save({"state_dict": Attack(target)}, path)
        sentence = refused(path)
        assert "refused" in sentence
        assert "posix.system" in sentence
    assert not target.exists()
    pickle.loads((tmp_path / "plain").read_bytes())
    assert target.exists(), "the attack itself does not work, so the test says nothing"


def test_more_than_weights_is_named(tmp_path):
    torch.save({"args": SimpleNamespace(lr=1)}, tmp_path / "x")
    sentence = refused(tmp_path / "x")
    assert "types.SimpleNamespace" in sentence
    assert "add_safe_globals" in sentence


def test_a_tensor_is_no_checkpoint(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "x")
    assert "holds a Tensor" in refused(tmp_path / "x")


def test_what_is_written_is_read(tmp_path):
    state = {"epoch": 3, "x": torch.randn(4), "run": {"seed": 5, "ids": [1, 2], "flag": True, "none": None}}
    files.write(state, str(tmp_path / "deep" / "x"))
    assert differences(files.read(str(tmp_path / "deep" / "x")), state) == []
    assert os.listdir(tmp_path / "deep") == ["x"]


# ------------------------------------------------------------------------------------------------- kills, disks


def _slow_disk(state: dict, file) -> None:
    whole = io.BytesIO()
    torch.serialization.save(state, whole)
    for start in range(0, whole.tell(), 50_000):
        file.write(whole.getvalue()[start : start + 50_000])
        file.flush()
        time.sleep(0.001)


def _keep_saving(folder: str) -> None:
    torch.set_num_threads(1)
    torch.save = _slow_disk  # else most kills would fall between two writes
    for step in range(1, 1 << 20):
        fill = torch.full((200_000,), float(step))
        checkpoint.save({"epoch": step // 3, "fill": fill, "run": {"batch": step % 3, "step": step}}, folder, keep=2)


@pytest.mark.dist
def test_a_kill_at_any_instant_leaves_a_loadable_checkpoint(tmp_path):
    folder = str(tmp_path)
    moments = random.Random(0)
    steps = []
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["main_pretrain", "timm", "torch.utils.tensorboard"])
    for _ in range(12):
        process = context.Process(target=_keep_saving, args=(folder,))
        process.start()
        before = os.path.getmtime(tmp_path / "latest") if steps else 0
        while not os.path.exists(tmp_path / "latest") or os.path.getmtime(tmp_path / "latest") == before:
            time.sleep(0.002)  # it has begun to write
        time.sleep(moments.uniform(0, 0.15))
        process.kill()
        process.join()
        path = run_folder.newest(folder)
        when = run_folder.written(folder)
        assert path and when[path] == max(when.values())  # the pointer may be one behind
        state = files.read(path)
        steps.append(state["run"]["step"])
        assert bool((state["fill"] == steps[-1]).all())
        for name in run_folder.runs_checkpoints(folder):  # every name is a whole file; only .tmp may be torn
            files.read(os.path.join(folder, name))
    assert len(set(steps)) > 1, "the kills all fell at the same place"


def _fill_the_disk(folder: str, result: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    state = {"epoch": 2, "x": torch.zeros(100_000), "run": {"batch": 0, "step": 2}}
    try:
        checkpoint.save(state, folder, keep=1)
    except UserError as error:
        with open(result, "w") as file:
            file.write(str(error))


@pytest.mark.dist
def test_a_full_disk_is_a_sentence_and_costs_nothing(tmp_path):
    folder = tmp_path / "run"
    old = checkpoint.save({"epoch": 1, "run": {"batch": 0, "step": 1}}, str(folder), keep=1)
    process = multiprocessing.get_context("forkserver").Process(
        target=_fill_the_disk, args=(str(folder), str(tmp_path / "result"))
    )
    process.start()
    process.join(60)
    assert process.exitcode == 0
    sentence = (tmp_path / "result").read_text()
    assert "checkpoint_0001.pth.tar cannot be written" in sentence
    assert "make room" in sentence
    assert run_folder.newest(str(folder)) == old
    assert sorted(os.listdir(folder)) == ["checkpoint_0000.pth.tar", "latest"]


def test_a_failed_write_leaves_the_older_file_of_that_name(tmp_path, full_disk):
    path = str(tmp_path / "x")
    files.write({"epoch": 1}, path)
    with full_disk(20_000), pytest.raises(UserError, match="x cannot be written .*File too large.; make room") as error:
        files.write({"epoch": 2, "x": torch.zeros(100_000)}, path)
    assert isinstance(error.value.__cause__, OSError)
    assert files.read(path) == {"epoch": 1}
    assert os.listdir(tmp_path) == ["x"]


def test_what_else_goes_wrong_while_a_file_is_written_is_no_full_disk(tmp_path, monkeypatch):
    def died(state, file):
        file.write(b"PK")
        raise RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed.")

    path = str(tmp_path / "x")
    files.write({"epoch": 1}, path)
    monkeypatch.setattr(torch, "save", died)
    with pytest.raises(RuntimeError, match="killed by signal"):
        files.write({"epoch": 2}, path)
    assert os.listdir(tmp_path) == ["x"]


def test_a_full_disk_that_a_library_only_quotes(tmp_path):
    from safetensors.torch import save_file

    path = str(tmp_path / "x")

    def quoted():
        with files.replacing(path) as beside:
            save_file({"x": torch.zeros(4)}, os.path.join(beside, "nothing", "here"))

    with pytest.raises(Exception, match="os error 2|code: 2,"):  # a missing folder is no full disk
        quoted()

    older = 'IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'  # safetensors 0.6
    for text in (older, "Error while serializing: I/O error: No space left on device (os error 28)", "[Errno 122] ..."):
        with pytest.raises(Exception, match=r"x cannot be written|Errno 122") as error, files.replacing(path):
            raise RuntimeError(text)
        assert isinstance(error.value, UserError) == ("28" in text)


def test_an_error_that_is_not_the_writers_is_no_full_disk(tmp_path):
    path = tmp_path / "x"
    path.write_text("older")

    def wrong() -> None:
        with files.replacing(str(path)) as beside, open(beside, "w") as file:
            file.write("half")
            raise RuntimeError("sizes of tensors differ")

    with pytest.raises(RuntimeError, match="^sizes of tensors differ$"):
        wrong()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("x", "older")]


def test_a_full_disk_at_the_pointer_is_a_sentence_too(tmp_path, monkeypatch):
    def full(text, path):
        with files.replacing(path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_text", full)
    with pytest.raises(UserError, match="latest cannot be written.*No space left"):
        checkpoint.save({"epoch": 1, "run": {"batch": 0, "step": 1}}, str(tmp_path), keep=1)


# ------------------------------------------------------------------------------------------------ a run's folder


def save(folder, epoch, batch=0, step=0, keep=0) -> str:
    state = {"epoch": epoch, "run": {"batch": batch, "step": step}}
    return os.path.basename(checkpoint.save(state, str(folder), keep))


def kept(folder) -> list[str]:
    return run_folder.runs_checkpoints(str(folder))


def test_names_are_upstreams_and_say_the_step_inside_an_epoch(tmp_path):
    assert save(tmp_path, 1, step=10) == "checkpoint_0000.pth.tar"
    assert save(tmp_path, 1, batch=3, step=13) == "checkpoint_0001_step_00000013.pth.tar"
    assert save(tmp_path, 20000) == "checkpoint_19999.pth.tar"
    assert (tmp_path / "latest").read_text() == "checkpoint_19999.pth.tar\n"


def test_pruning_rule(tmp_path):
    for epoch in range(1, 6):
        save(tmp_path, epoch, keep=2)
    assert kept(tmp_path) == ["checkpoint_0003.pth.tar", "checkpoint_0004.pth.tar"]
    save(tmp_path, 5, batch=1, step=51, keep=2)
    inside = "checkpoint_0005_step_00000051.pth.tar"
    assert kept(tmp_path) == ["checkpoint_0003.pth.tar", "checkpoint_0004.pth.tar", inside]
    save(tmp_path, 6, keep=1)
    assert kept(tmp_path) == ["checkpoint_0005.pth.tar"]


def test_a_folder_called_latest_ends_no_run(tmp_path):
    (tmp_path / "latest").mkdir()
    save(tmp_path, 1)
    assert kept(tmp_path) == ["checkpoint_0000.pth.tar"]


def test_keep_0_keeps_all_but_what_lies_inside_epochs(tmp_path):
    for epoch in range(1, 5):
        save(tmp_path, epoch - 1, batch=1, step=epoch)
        save(tmp_path, epoch)
    assert kept(tmp_path) == [f"checkpoint_{n:04d}.pth.tar" for n in range(4)]


def test_other_files_are_left_alone(tmp_path):
    for name in ("checkpoint_best.pth.tar", "notes.txt", "bad_step_00000003_rank0.pt"):
        (tmp_path / name).write_text("")
    save(tmp_path, 1, keep=1)
    save(tmp_path, 2, keep=1)
    checkpoint.reserve_run_folder(str(tmp_path), None, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == [
        "bad_step_00000003_rank0.pt", "checkpoint_best.pth.tar", "latest", "notes.txt"
    ]  # fmt: skip


def aged(path, seconds: float) -> None:
    """As if written so much later than it was."""
    when = os.stat(path).st_mtime_ns + int(1e9 * seconds)
    os.utime(path, ns=(when, when))


def auto(folder, one=None) -> tuple[str | None, str]:
    """Name of what --resume auto takes, and what it says."""
    found = run_folder.newest_good(str(folder), one)
    if found.path:
        assert differences(found.state, files.read(found.path)) == []
    return found.path and os.path.basename(found.path), "\n".join(found.told)


def test_resume_takes_the_newest_whatever_the_pointer_is(tmp_path):
    assert auto(tmp_path) == auto(tmp_path / "missing") == (None, "")
    assert run_folder.newest(str(tmp_path)) is None
    for epoch in (9, 10, 11):
        save(tmp_path, epoch)
    last = save(tmp_path, 11, batch=2, step=99)
    assert auto(tmp_path) == (last, "")
    pointer = tmp_path / "latest"
    pointer.write_text("checkpoint_0009.pth.tar\n")  # a kill came before it was written
    assert auto(tmp_path) == (last, f"latest names checkpoint_0009.pth.tar, but {last} is newer")
    for content in (b"", b"\xff\xfe\x00", b"/elsewhere/checkpoint_0009.pth.tar", b"../checkpoint_0009.pth.tar"):
        pointer.write_bytes(content)
        name, told = auto(tmp_path)
        assert name == last
        assert "latest names no checkpoint of this folder" in told or "latest cannot be read" in told
    pointer.write_text("checkpoint_0077.pth.tar\n")
    assert "which is missing; the checkpoint with most progress is taken" in auto(tmp_path)[1]
    pointer.unlink()
    assert auto(tmp_path) == (last, "")
    pointer.mkdir()
    assert "latest is no file" in auto(tmp_path)[1]
    pointer.rmdir()
    os.mkfifo(pointer)
    assert auto(tmp_path)[0] == last
    assert run_folder.newest(str(tmp_path)) == str(tmp_path / last)


def test_a_run_that_went_back_is_not_led_to_where_it_was(tmp_path):
    """--resume of epoch 2's file among those of five: the third is written anew, the others are of the old course."""
    for epoch in range(1, 6):
        aged(tmp_path / save(tmp_path, epoch), -100 + epoch)
    assert auto(tmp_path) == ("checkpoint_0004.pth.tar", "")
    save(tmp_path, 3, keep=2)
    assert kept(tmp_path) == [f"checkpoint_{n:04d}.pth.tar" for n in (1, 2, 3, 4)]  # those ahead neither go nor count
    name, told = auto(tmp_path)
    assert name == "checkpoint_0002.pth.tar"
    assert told == "checkpoint_0002.pth.tar, which latest names, was written after checkpoint_0004.pth.tar"
    (tmp_path / "checkpoint_0002.pth.tar").write_bytes(b"damaged")
    aged(tmp_path / "checkpoint_0002.pth.tar", 0)
    assert auto(tmp_path)[0] == "checkpoint_0001.pth.tar"
    save(tmp_path, 4, keep=2)
    save(tmp_path, 5, keep=2)
    assert kept(tmp_path) == ["checkpoint_0003.pth.tar", "checkpoint_0004.pth.tar"]


def test_a_damaged_file_is_passed_over_and_that_is_said(tmp_path):
    for epoch in range(1, 5):
        save(tmp_path, epoch, step=10 * epoch)
    for number in (3, 2):
        whole = (tmp_path / f"checkpoint_{number:04d}.pth.tar").read_bytes()
        (tmp_path / f"checkpoint_{number:04d}.pth.tar").write_bytes(whole[:-100])
    (tmp_path / "checkpoint_0004.pth.tar").mkdir()
    name, told = auto(tmp_path)
    assert name == "checkpoint_0001.pth.tar"
    lines = told.splitlines()
    assert len(lines) == 5  # of latest, of three files, and of how far it goes back
    assert f"passed over: {tmp_path / 'checkpoint_0003.pth.tar'} is no readable checkpoint" in lines[2]
    assert lines[-1] == (
        f"--resume auto goes back to {tmp_path / name}, which is at epoch 2, step 20; 3 newer ones cannot be read: "
        "checkpoint_0004.pth.tar, checkpoint_0003.pth.tar, checkpoint_0002.pth.tar"
    )
    for number in (0, 1):
        (tmp_path / f"checkpoint_{number:04d}.pth.tar").write_bytes(b"x")
    with pytest.raises(UserError, match=r"holds 5 checkpoints, none of which .*checkpoint_0004.*--overwrite"):
        run_folder.newest_good(str(tmp_path))


def test_pruning_counts_only_what_can_be_read(tmp_path):
    for epoch in range(1, 5):
        save(tmp_path, epoch)
    for number in (1, 3):
        (tmp_path / f"checkpoint_{number:04d}.pth.tar").write_bytes(b"damaged")
    save(tmp_path, 5, keep=2)
    assert kept(tmp_path) == [f"checkpoint_{number:04d}.pth.tar" for number in (2, 3, 4)]
    own: set[str] = set()
    for epoch in (6, 7):
        checkpoint.save({"epoch": epoch, "run": {"batch": 0, "step": 0}}, str(tmp_path), 2, own)
    assert kept(tmp_path) == ["checkpoint_0005.pth.tar", "checkpoint_0006.pth.tar"]


def test_what_this_run_has_written_is_not_read_again(tmp_path, monkeypatch):
    read, own, original = [], set(), files.read
    monkeypatch.setattr(files, "read", lambda path: read.append(os.path.basename(path)) or original(path))
    save(tmp_path, 1)
    for epoch in (2, 3, 4):
        checkpoint.save({"epoch": epoch, "run": {"batch": 0, "step": 0}}, str(tmp_path), 3, own)
    assert read == ["checkpoint_0000.pth.tar"]


def test_of_the_one_checkpoint_the_one_before_stays(tmp_path):
    path, own = str(tmp_path / "one.tar"), set()
    assert auto(tmp_path, "one.tar") == (None, "")
    for epoch in (1, 2, 3):
        checkpoint.save_one({"epoch": epoch, "run": {"batch": 4}}, path, own)
    assert sorted(os.listdir(tmp_path)) == ["one.tar", "one.tar.previous"]
    assert auto(tmp_path, "one.tar") == ("one.tar", "")
    (tmp_path / "one.tar").write_bytes(b"damaged")
    name, told = auto(tmp_path, "one.tar")
    assert name == "one.tar.previous"
    assert "is at epoch 2, batch 4; 1 newer ones cannot be read: one.tar" in told
    checkpoint.save_one({"epoch": 3, "run": {}}, path, set())  # of the run that goes on: what is damaged is not kept
    assert (files.read(path)["epoch"], files.read(path + ".previous")["epoch"]) == (3, 2)
    os.remove(path)
    assert "one.tar is missing" in auto(tmp_path, "one.tar")[1]


@pytest.mark.parametrize("failing", ["torch_save", "replace"])
def test_a_full_disk_leaves_nothing_beside_the_two(failing, tmp_path, monkeypatch):
    path, own = str(tmp_path / "one.tar"), set()
    for epoch in (1, 2):
        checkpoint.save_one({"epoch": epoch, "run": {}}, path, own)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, failing, full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save_one({"epoch": 3, "run": {}}, path, own)
    assert sorted(os.listdir(tmp_path)) == ["one.tar", "one.tar.previous"]
    assert (files.read(path)["epoch"], files.read(path + ".previous")["epoch"]) == (2, 1)


def test_a_file_system_without_links_keeps_none(tmp_path, monkeypatch):
    def refused(*names):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    for epoch in (1, 2):
        checkpoint.save_one({"epoch": epoch}, str(tmp_path / "x"), set())
    assert os.listdir(tmp_path) == ["x"]
    assert files.read(str(tmp_path / "x")) == {"epoch": 2}


def test_a_folder_belongs_to_one_run(tmp_path):
    folder = str(tmp_path / "run")
    checkpoint.reserve_run_folder(folder, None, overwrite=False)
    name = save(folder, 1)
    mine = os.path.join(folder, name)
    checkpoint.reserve_run_folder(folder, mine, overwrite=False)  # it goes on
    for resumed in (None, str(tmp_path / "elsewhere.pth.tar")):
        with pytest.raises(UserError, match=r"already holds checkpoint_0000.*--resume auto.*--overwrite"):
            checkpoint.reserve_run_folder(folder, resumed, overwrite=False)
    assert kept(folder) == [name]
    checkpoint.reserve_run_folder(folder, mine, overwrite=True)
    assert kept(folder) == [name], "--overwrite must not remove what is continued"
    checkpoint.reserve_run_folder(folder, None, overwrite=True)
    assert kept(folder) == []


def test_a_result_of_another_program_belongs_to_a_run_too(tmp_path):
    folder, names = str(tmp_path), ("mine.tar", "mine_0003.tar", "result.json", "other.tar")
    own = {"files": ("mine.tar",), "results": ("result.json",), "more": ("mine_[0-9]*.tar",)}
    (tmp_path / "other.tar").write_text("")
    checkpoint.reserve_run_folder(folder, None, False, **own)
    (tmp_path / "result.json").write_text("")
    with pytest.raises(UserError, match=r"holds result.json of another run; choose another --save-dir"):
        checkpoint.reserve_run_folder(folder, None, False, **own)
    for name in names:
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match=r"holds mine.tar of another run; continue it with --resume auto"):
        checkpoint.reserve_run_folder(folder, None, False, **own)
    checkpoint.reserve_run_folder(folder, str(tmp_path / "mine.tar"), False, **own)
    assert sorted(os.listdir(folder)) == sorted(names)
    checkpoint.reserve_run_folder(folder, None, True, **own)
    assert os.listdir(folder) == ["other.tar"]


def test_processes_may_clear_a_folder_at_the_same_time(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "runs_checkpoints", lambda folder: ["checkpoint_0000.pth.tar"])
    checkpoint.reserve_run_folder(str(tmp_path), None, overwrite=True)  # another process has just removed it


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--save-dir .* cannot be made"):
        checkpoint.reserve_run_folder(str(tmp_path / "file" / "run"), None, overwrite=False)


# ---------------------------------------------------------------------------------------------- a training state


def encoder(head: str, dim: int) -> nn.Module:
    last = nn.Linear(6, dim)
    fc = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), last) if head == "mlp" else last
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 6, 2), norm=nn.BatchNorm2d(6), pool=nn.AdaptiveAvgPool2d(1),
                                     flat=nn.Flatten(), fc=fc))  # fmt: skip


def training_state(head: str = "linear", K: int = 12, C: int = 4, scale: bool = False, seed: int = 1):
    """A model, its optimizer with momentum, a scaler."""
    torch.manual_seed(seed)
    config = MoCoConfig(C=C, K=K, m=0.9, T=0.2, mean=(0.0,) * 3, std=(1.0,) * 3)
    model = MoCo(encoder(head, C), encoder(head, C), config, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    model.encode_queries(torch.randn(4, 3, 4, 4)).sum().backward()
    optimizer.step()
    return model, optimizer, torch.amp.GradScaler("cpu", enabled=scale)


def contents(model, optimizer, scaler) -> dict:
    state = checkpoint.pack(model, optimizer, scaler, "net", 3, {"batch": 0, "step": 9})
    return pickle.loads(pickle.dumps(state))


def test_pack_has_upstreams_keys():
    state = contents(*training_state())
    assert {"epoch", "arch", "state_dict", "optimizer"} <= state.keys()
    names = state["state_dict"].keys()
    assert {"module.queue", "module.queue_ptr", "module.encoder_q.fc.weight", "module.encoder_k.fc.weight"} <= names
    assert all(name.startswith("module.") for name in names)


def test_unpack_gives_back_all_of_it():
    state = contents(*training_state(scale=True))
    other = training_state(scale=True, seed=2)
    assert len(differences(contents(*other), state)) > 10
    entries = checkpoint.unpack(state, "x", *other, "net")
    assert entries == {"epoch": 3, "batch": 0, "step": 9}
    assert differences(contents(*other), state) == []


@pytest.mark.parametrize("transposed", [True, False])
def test_upstreams_queue_becomes_rows_of_unit_length(transposed):
    """MoCo's is (C, K); SynCo's (K, C), not of unit rows where its first state is still in place."""
    trained = training_state()
    state = contents(*trained)
    del state["state_dict"]["module.queue_ids"], state["run"], state["scaler"]
    rows = torch.randn(12, 4)
    state["state_dict"]["module.queue"] = rows.T.contiguous() if transposed else rows
    fresh = training_state()
    assert checkpoint.unpack(state, "x", *fresh, "net") == {"epoch": 3}
    torch.testing.assert_close(fresh[0].queue, nn.functional.normalize(rows, dim=1))
    assert bool((fresh[0].queue_ids == -1).all())


@pytest.mark.parametrize("whose", ["MoCo's", "SynCo's"])
def test_an_upstream_queue_with_k_equal_to_c_is_read_by_its_unit_vectors(whose):
    """The shape says nothing. SynCo's: two keys have taken the place of its first rows, whose columns had been unit."""
    rows = nn.functional.normalize(torch.randn(4, 4, generator=torch.Generator().manual_seed(5)), dim=1)
    if whose == "SynCo's":
        rows[2:] = nn.functional.normalize(torch.randn(4, 4), dim=0)[2:]
    state = contents(*training_state(K=4))
    del state["state_dict"]["module.queue_ids"], state["run"], state["scaler"]
    state["state_dict"]["module.queue"] = rows.T.contiguous() if whose == "MoCo's" else rows
    fresh = training_state(K=4)
    said = checkpoint.square_queue(state)
    assert said.startswith("K equals C, so the shape of the queue does not say whose it is")
    assert f"taken as {whose}" in said
    checkpoint.unpack(state, "x", *fresh, "net")
    torch.testing.assert_close(fresh[0].queue, nn.functional.normalize(rows, dim=1))


def test_the_queue_of_a_file_of_ours_and_one_that_is_not_square_need_no_guess():
    state = contents(*training_state(K=4))
    queue = state["state_dict"]["module.queue"].clone()
    fresh = training_state(K=4, seed=2)
    assert checkpoint.square_queue(state) == ""
    checkpoint.unpack(state, "x", *fresh, "net")
    assert torch.equal(fresh[0].queue, queue)
    other = contents(*training_state())
    del other["state_dict"]["module.queue_ids"]
    assert checkpoint.square_queue(other) == ""


def test_a_run_that_did_not_scale_its_loss_goes_on_scaling():
    state = contents(*training_state())
    assert state["scaler"] == {}
    model, optimizer, scaler = training_state(scale=True)
    checkpoint.unpack(state, "x", model, optimizer, scaler, "net")
    assert scaler.get_scale() == 65536


def other_optimizer(state):
    state["optimizer"]["param_groups"].append(state["optimizer"]["param_groups"][0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update(arch="resnet50"), "trained with -a resnet50; this run has -a net"),
        (
            lambda s: s.pop("optimizer"),
            "lacks state_dict or optimizer, as published weights do; to begin with its encoder give it by --pretrained",
        ),
        (lambda s: s.pop("state_dict"), "lacks state_dict or optimizer"),
        (lambda s: s["state_dict"].pop("module.encoder_k.norm.weight"), "lacks encoder_k.norm.weight .1 entries"),
        (lambda s: s["state_dict"].update(more=torch.zeros(1)), "has more, which this run does not know"),
        (other_optimizer, "does not fit this run's optimizer"),
        (lambda s: s.update(optimizer={}), "does not fit this run's optimizer"),
        (lambda s: s["state_dict"]["module.queue"][2].fill_(torch.nan), "queue holds NaN or infinity; take another"),
        (
            lambda s: s["state_dict"].update({"module.queue": s["state_dict"]["module.queue"].long()}),
            "queue holds int64 numbers",
        ),
    ],
)
def test_another_state_is_a_sentence_and_changes_nothing(change, words):
    _refuses(contents(*training_state()), change, words)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"K": 16}, r"queue has shape \(16, 4\), this run needs \(12, 4\); check --moco-k"),
        ({"C": 5}, r"shape \(12, 5\), this run needs \(12, 4\); check --moco-k, --moco-dim"),
        ({"head": "mlp"}, "entries differ.; check -a, --mlp, --stem, --method and --ema"),
    ],
)
def test_other_sizes_are_a_sentence_and_change_nothing(settings, words):
    _refuses(contents(*training_state(**settings)), lambda s: None, words)


def _refuses(state, change, words):
    mine = training_state(seed=2)
    before = contents(*mine)
    change(state)
    with pytest.raises(UserError, match=words) as error:
        checkpoint.unpack(state, "FILE", *mine, "net")
    assert str(error.value).startswith("FILE")
    assert differences(contents(*mine), before) == []


@pytest.mark.parametrize("content", ["[" * 100_000, "1" * 5000, '{"a"', "[3]", "\0", ""])
def test_json_that_is_no_dictionary_is_none(content, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(content)
    assert files.read_json(str(path)) == {}
    path.write_text(f'{content}\n{{"step": 1}}\n')
    assert list(files.records(str(path))) == [{"step": 1}]
