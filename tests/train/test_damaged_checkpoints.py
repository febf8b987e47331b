"""Damaged and crafted checkpoints: read gives what was written or one sentence, and takes no memory that they claim."""

import math
import random
import zipfile

import pytest
import torch
from conftest import differences
from torch import nn

from moco import archive, files
from moco.errors import UserError
from moco.train.optimizer_state import kept
from moco.train.resume import begin_run
from moco.weights.average import average


def small_state() -> dict:
    """Of a network with BatchNorm, an optimizer and plain values of each kind."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    plain = {"step": 3, "kinds": [1, 2.5, None, True, "word"], "none": torch.zeros(0)}
    return {"epoch": 1, "state_dict": network.state_dict(), "optimizer": optimizer.state_dict(), "plain": plain}


@pytest.fixture
def path(tmp_path):
    files.write(small_state(), str(tmp_path / "x.pth.tar"))
    return tmp_path / "x.pth.tar"


def read_or_sentence(path) -> dict | str:
    """What is read, or the sentence that says why not."""
    archive._checked.clear()  # a test writes faster than a file system's clock ticks
    said = ""
    try:
        return files.read(str(path))
    except UserError as error:
        said = str(error)
    assert str(path) in said and "\n" not in said
    return said


def sentence(path) -> str:
    found = read_or_sentence(path)
    assert isinstance(found, str), "it was read"
    return found


# ------------------------------------------------------------------------------------------------------- damage


def test_a_flipped_bit_is_a_sentence_or_changes_nothing(path):
    whole, moments, refused, wrong = path.read_bytes(), random.Random(0), 0, []
    start = zipfile.ZipFile(path).start_dir  # half of them in the directory, which no checksum is of
    for number in range(300):
        content, bit = bytearray(whole), moments.randrange(8 * (start if number % 2 else 0), 8 * len(whole))
        content[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(content)
        found = read_or_sentence(path)
        refused += isinstance(found, str)
        if not isinstance(found, str) and differences(found, small_state()):
            wrong.append(bit)
    assert wrong == []
    assert refused > 100


def test_a_flipped_bit_of_a_weight_names_the_entry(path):
    content = bytearray(path.read_bytes())
    place = content.index(small_state()["state_dict"]["0.weight"].numpy().tobytes())
    content[place + 3] ^= 1
    path.write_bytes(content)
    assert "is damaged: the checksum of its entry archive/data/0 is not that of the content; take" in sentence(path)


def test_an_entry_that_is_called_a_folder_is_refused(path):
    """torch takes such an entry for empty: its tensor holds what lay in the memory."""
    content = bytearray(path.read_bytes())
    place = content.index(b"archive/data/0", zipfile.ZipFile(path).start_dir) - 46
    content[place + 38] ^= 0x10
    path.write_bytes(content)
    assert "calls an entry a folder" in sentence(path)


def test_a_file_whose_checksums_were_not_written_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(small_state(), tmp_path / "x")
    finally:
        torch.serialization.set_crc32_options(True)
    assert {entry.CRC for entry in zipfile.ZipFile(tmp_path / "x").infolist()} == {0}
    assert differences(read_or_sentence(tmp_path / "x"), small_state()) == []


def test_a_single_checksum_of_0_is_damage(path):
    content = bytearray(path.read_bytes())
    place = content.index(b"archive/data/0", zipfile.ZipFile(path).start_dir) - 46
    content[place + 16 : place + 20] = bytes(4)
    path.write_bytes(content)
    assert "checksum of its entry archive/data/0" in sentence(path)


def test_files_of_before_torch_1_6_are_read_and_their_damage_is_a_sentence(tmp_path):
    torch.save(small_state(), tmp_path / "x", _use_new_zipfile_serialization=False)
    assert differences(read_or_sentence(tmp_path / "x"), small_state()) == []
    whole, moments = (tmp_path / "x").read_bytes(), random.Random(0)
    for _ in range(60):
        content = bytearray(whole)
        content[moments.randrange(len(whole))] ^= 1 << moments.randrange(8)
        (tmp_path / "x").write_bytes(content)
        read_or_sentence(tmp_path / "x")


# ------------------------------------------------------------------------------------------------- crafted files


class Calls:
    """A pickle of this calls a function with arguments."""

    def __init__(self, function, *arguments):
        self.how = function, arguments

    def __reduce__(self):
        return self.how


def changed_pickle(path, change) -> None:
    """The same file, its checksums right, with another pickle."""
    archived = zipfile.ZipFile(path)
    contents = {entry.filename: archived.read(entry) for entry in archived.infolist()}
    with zipfile.ZipFile(path, "w") as made:
        for name, content in contents.items():
            made.writestr(name, change(content) if name.endswith("data.pkl") else content)


def lie_about_a_size(pickle: bytes) -> bytes:
    place = pickle.index(b"K\x0c", pickle.index(b"X\x03\x00\x00\x00cpu"))  # 12 numbers
    return pickle[:place] + b"J" + (1 << 30).to_bytes(4, "little") + pickle[place + 2 :]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lie_about_a_size, "storage 0 has another size than its tensors say"),
        (lambda pickle: pickle.replace(b"q\x01", b"r\xff\xff\xff\x7f", 1), "more memory"),
        (lambda pickle: b"\x80\x02(" + b"}" * 3000 + b"t.", "more memory"),
        (lambda pickle: b"\x80\x02X\xff\xff\xff\x7fabc.", "no readable checkpoint"),
        (lambda pickle: b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".", "no readable checkpoint"),
    ],
    ids=["a storage", "a memo's index", "objects", "a word", "bytes"],
)
def test_a_pickle_that_claims_memory(change, words, path, monkeypatch):
    monkeypatch.setattr(archive, "_MOST_OPERATIONS", 2000)
    changed_pickle(path, change)
    assert words in sentence(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "claim",
    [Calls(bytearray, 10**13), [Calls(set, numbers) for numbers in [list(range(10_000))] for _ in range(200)]],
    ids=["one call", "many calls"],
)
def test_calls_that_make_more_than_the_file_has(claim, zipped, tmp_path):
    torch.save({"x": claim}, tmp_path / "x", _use_new_zipfile_serialization=zipped)
    assert "more memory" in sentence(tmp_path / "x")


def test_a_storage_of_an_old_file_that_claims_memory(tmp_path):
    torch.save(small_state(), tmp_path / "x", _use_new_zipfile_serialization=False)
    content = (tmp_path / "x").read_bytes()
    place = content.index(b"X\x03\x00\x00\x00cpu")
    place = content.index(b"K\x0c", place)
    (tmp_path / "x").write_bytes(content[:place] + b"J" + (1 << 30).to_bytes(4, "little") + content[place + 2 :])
    assert "another size" in sentence(tmp_path / "x")


def test_compressed_entries_that_are_larger_than_their_file(path):
    archived = zipfile.ZipFile(path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as made:
        made.writestr("archive/data/99", bytes(10_000_000))
    assert len(archived.infolist()) > 5
    assert "names more than the file holds" in sentence(path)


# ------------------------------------------------------------------------------------------------------- entries


RUN = {"seed": 1, "step": 12, "draw": 12, "batch": 0, "ema_due": True, "bad_steps": 0, "bad_images": {"seen": [3]}}


def ours(**entries) -> dict:
    """A pretraining's file."""
    return {**small_state(), "arch": "x", "scaler": {}, "run": {**RUN, **entries}}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"batch": -1}, "run.batch is -1, not a whole number"), ({"step": True}, "run.step is True"),
        ({"step": float("nan")}, "run.step is nan"), ({"step": 12.0}, "run.step is 12.0"), ({"seed": None}, "run.seed"),
        ({"step": 1 << 60}, "run.step"), ({"step": 100}, "run.step does not fit"), ({"bad_steps": 13}, "run.bad_steps"),
        ({"bad_images": []}, "run.bad_images is a list"), ({"bad_images": {}}, "lacks the entry run.bad_images.seen"),
        ({"flags": {"--wd": float("nan")}}, "run.flags"), ({"losses": [[1.0, torch.ones(1)]]}, "run.losses[0][1]"),
        ({"images": {"size": 1 << 40}}, "run.images.size"), ({"images": {"mean": [0.5], "channels": 3}}, "run.images"),
        ({"plateau": {"factor": 0.1}}, "run.plateau.rule"), ({"classes": [1]}, "run.classes[0] is 1, not a word"),
        ({"changes": {"stem_padding": 1 << 30}}, "run.changes"), ({"head": {"impl": 3}}, "run.head.impl"),
        ({"torch": "2.6"}, "run.torch is '2.6', not a dictionary"), ({"step": torch.ones(1)}, "run.step is a Tensor"),
    ],
)  # fmt: skip
def test_an_entry_of_a_run_that_no_run_has_is_named(entries, words, tmp_path):
    torch.save(ours(), tmp_path / "x")
    assert isinstance(read_or_sentence(tmp_path / "x"), dict)
    torch.save(ours(**entries), tmp_path / "x")
    assert words in sentence(tmp_path / "x")


@pytest.mark.parametrize("name", RUN)
def test_a_missing_entry_of_a_run_is_named(name, tmp_path):
    state = ours()
    del state["run"][name]
    torch.save(state, tmp_path / "x")
    assert f"lacks the entry run.{name}" in sentence(tmp_path / "x")


def test_other_projects_files_are_not_asked_for_our_entries(tmp_path):
    torch.save({"epoch": "last", "run": "of Monday", "state_dict": {"a": torch.ones(1)}}, tmp_path / "x")
    assert isinstance(read_or_sentence(tmp_path / "x"), dict)


def test_a_weights_whole_state_of_an_optimizer_that_is_lost_is_damage(tmp_path):
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(3)) for _ in range(3)]
    optimizer = torch.optim.SGD(weights, 0.1, momentum=0.9)
    (weights[0].sum() + weights[1].sum()).backward()
    optimizer.step()
    state = {**ours(), "optimizer": kept(optimizer)}
    torch.save(state, tmp_path / "x")
    assert isinstance(read_or_sentence(tmp_path / "x"), dict)  # the third never got a gradient
    optimizer.load_state_dict(state["optimizer"])
    assert "kept" not in optimizer.state_dict()
    lost = kept(optimizer)
    del lost["state"][1]
    head = {"lr": 1.0, "layer": {}, "best_acc1": 1.0, "diverged": False, "optimizer": lost}
    for entries in ({"optimizer": lost}, {"best_acc1": 1.0, "heads": [head]}):
        torch.save({**state, **entries}, tmp_path / "x")
        assert "does not have the state of as many weights as were kept" in sentence(tmp_path / "x")


THEIRS = {"state_dict": {"module.a": torch.ones(2)}, "epoch": 3, "arch": "resnet50", "optimizer": {}}


@pytest.mark.parametrize("entries", [
    {"epoch": "3"}, {"epoch": -1}, {"epoch": 10**30}, {"epoch": torch.ones(2)}, {"arch": []}, {"arch": {}},
    {"scaler": 7}, {"best_acc1": {}}, {"best_acc1": torch.ones(2)}, {"best_acc1": torch.tensor(math.nan)},
    {"acc1": "x"}, {"optimizer": torch.ones(2)}, {"optimizer": {"param_groups": [3]}},
    {"state_dict": torch.ones(2)}, {"state_dict": {"module.a": {}}},
])  # fmt: skip
def test_no_run_goes_on_from_odd_entries_of_another_projects_file(entries, tmp_path):
    for name, odd in (("good", {"best_acc1": torch.tensor([50.0])}), ("odd", entries)):
        files.write({**THEIRS, **odd}, str(tmp_path / name))
    for path in (tmp_path / "good", None):
        assert begin_run(str(path or ""), str(tmp_path / "run"), 0)[2] == 0
    with pytest.raises(UserError, match=f"odd is damaged: its entry {next(iter(entries))}"):
        begin_run(str(tmp_path / "odd"), str(tmp_path / "run"), 0)
    with pytest.raises(UserError, match=f"odd is damaged: its entry {next(iter(entries))}"):
        average([str(tmp_path / "good"), str(tmp_path / "odd")])


@pytest.mark.parametrize("entries", [
    {"state_dict": {"module.queue_ids": torch.ones(2)}},
    {"scaler": {}, "state_dict": {"module.encoder_q.a": torch.ones(2)}},
    {"best_acc1": 3.0, "scaler": {}}, {"best_acc1": 3.0, "heads": []},
])  # fmt: skip
def test_a_file_of_ours_without_its_run_is_damaged(entries, tmp_path):
    files.write({**THEIRS, **entries}, str(tmp_path / "x"))
    assert "is damaged: it lacks the entry run" in sentence(tmp_path / "x")


@pytest.mark.parametrize("odd", [torch.zeros(1).expand(10**9), torch.zeros(2, device="meta")])
def test_a_tensor_that_is_larger_than_its_file_is_refused(odd, tmp_path):
    torch.save({"state_dict": {"a": odd}}, tmp_path / "x")
    assert "no checkpoint that can be used" in sentence(tmp_path / "x")
