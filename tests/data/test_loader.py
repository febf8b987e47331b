"""Datasets, sampler and loader: the same images whatever the workers and ranks; bad images replaced and counted."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from PIL import Image

from moco.data import (
    ArraySource,
    BadImageError,
    BadImages,
    EpochSampler,
    FileSource,
    Labelled,
    TwoViews,
    apply,
    draw,
    eval_view,
    get_preset,
    make_loader,
    probe_preset,
)
from moco.data import loader as loader_module
from moco.data.datasets import load_or_replace
from moco.errors import UserError
from moco.models.inputs import normalise
from moco.seeding import numpy_generator


def digits(n=40, channels=None):
    images = np.random.default_rng(0).integers(0, 256, (n, 12, 12), dtype=np.uint8)
    return ArraySource("toys", images, channels, ["even", "odd"], np.arange(n) % 2)


class Holes(ArraySource):
    """Images of which some cannot be read."""

    def __init__(self, n, bad):
        super().__init__("holes", np.arange(n, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8))
        self.labels, self.classes = np.arange(n), [str(i) for i in range(n)]
        self.bad, self.loads = set(bad), []

    def load(self, index):
        self.loads.append(index)
        if index in self.bad:
            raise BadImageError(f"{self.name_of(index)} (broken)")
        return super().load(index)


def collect(loader):
    return [{name: value.clone() for name, value in batch.items()} for batch in loader]


def equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


# Datasets


def test_two_views_by_definition():
    source, preset = digits(), get_preset("digits")
    item = TwoViews(source, preset, 10, seed=3)[(7, 5)]
    for view, name in enumerate("qk"):
        rng = numpy_generator("view", 3, 7, 5, view)
        assert torch.equal(item[name], apply(source.load(5), draw(preset, 12, 12, rng), 10))
    assert (item["index"], item["bad"]) == (5, -1)
    assert item["q"].shape == (1, 10, 10)
    assert item["q"].dtype == torch.uint8


def test_views_differ_by_seed_epoch_image_and_view():
    constant = ArraySource("constant", np.repeat(digits(1).images, 3, axis=0))
    preset = get_preset("digits")
    views = [
        TwoViews(constant, preset, 12, seed)[(epoch, index)][name]
        for seed in (0, 1) for epoch in (0, 1) for index in (0, 1) for name in "qk"
    ]  # fmt: skip
    assert len({view.numpy().tobytes() for view in views}) == 16


def test_an_image_is_decoded_once_for_both_views():
    source = Holes(5, [])
    TwoViews(source, get_preset("digits"), 4, 0)[(0, 2)]
    assert source.loads == [2]


def test_labelled():
    source = digits(channels=3)
    item = Labelled(source, 12)[(4, 3)]
    assert torch.equal(item["image"], eval_view(source.load(3), 12))
    assert (item["label"], item["index"], item["bad"]) == (1, 3, -1)
    item = Labelled(source, 8, 2, probe_preset(False))[(4, 3)]
    rng = numpy_generator("probe", 2, 4, 3)
    assert torch.equal(item["image"], apply(source.load(3), draw(probe_preset(False), 12, 12, rng), 8))
    unlabelled = ArraySource("bare", source.images)
    with pytest.raises(UserError, match="bare has no labels: give class folders"):
        Labelled(unlabelled, 8)


def test_bad_images_are_replaced_the_same_way_every_time():
    item = TwoViews(Holes(30, [4, 5, 22]), get_preset("digits"), 4, 0)[(1, 4)]
    again = TwoViews(Holes(30, [4, 5, 22]), get_preset("digits"), 4, 0)[(1, 4)]
    assert item["bad"] == again["bad"] == 4
    assert item["index"] == again["index"] not in (4, 5, 22)
    assert torch.equal(item["q"], again["q"])
    labelled = Labelled(Holes(30, [4]), 4)[(0, 4)]
    assert labelled["label"] == labelled["index"] == labelled["image"].max().item() != 4
    assert labelled["bad"] == 4


@pytest.mark.parametrize("n", [1, 2, 3, 4, 10, 15, 34, 97])
def test_replacement_tries_every_image_before_it_gives_up(n):
    only = n // 2
    source = Holes(n, set(range(n)) - {only})
    for index in range(n):
        image, used, bad = load_or_replace(source, index)
        assert used == only
        assert bad == (-1 if index == only else index)
        assert image.getpixel((0, 0)) == only


def test_giving_up_is_a_sentence(monkeypatch):
    with pytest.raises(UserError, match=r"none of 5 images tried in holes can be read, first holes\[3\] \(broken\)"):
        load_or_replace(Holes(5, range(5)), 3)
    source = Holes(90, range(90))
    monkeypatch.setattr("moco.data.datasets.MAX_TRIES", 7)
    with pytest.raises(UserError, match="none of 7 images"):
        TwoViews(source, get_preset("digits"), 4, 0)[(0, 3)]
    assert len(source.loads) == 7


def test_a_folder_with_every_kind_of_odd_file(tmp_path):
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    odd = {
        "one.png": Image.new("RGB", (1, 1), (9, 9, 9)),
        "cmyk.jpg": colour.convert("CMYK"),
        "deep.png": Image.fromarray(rng.integers(0, 65536, (20, 20), dtype=np.uint16)),
        "palette.png": colour.quantize(16),
        "grey.jpg": colour.convert("L"),
    }
    for name, image in odd.items():
        image.save(tmp_path / name)
    colour.save(tmp_path / "whole.jpg", quality=95)
    (tmp_path / "truncated.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    (tmp_path / "corrupt.png").write_bytes(b"\x89PNG nothing")
    names = [*odd, "whole.jpg", "truncated.jpg", "corrupt.png"]
    source = FileSource("odd", [str(tmp_path / name) for name in names])
    data = TwoViews(source, get_preset("v2"), 16, 0)
    items = [data[(0, index)] for index in range(len(names))]
    assert all(item["q"].shape == item["k"].shape == (3, 16, 16) for item in items)
    assert [item["bad"] for item in items] == [-1] * 6 + [6, 7]
    assert all(item["index"] < 6 for item in items)


# Sampler


def keys(n, batch, **options):
    epoch = options.pop("epoch", 0)
    sampler = EpochSampler(n, batch, seed=5, **options)
    sampler.set_position(epoch)
    return list(sampler)


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(("n", "batch"), [(20, 4), (23, 4), (23, 23), (24, 6)])
def test_an_epoch_visits_each_image_once(n, batch, drop_last):
    batches = keys(n, batch, drop_last=drop_last)
    seen = [index for step in batches for _, index in step]
    assert len(set(seen)) == len(seen) == (n // batch * batch if drop_last else n)
    assert len(batches) == len(EpochSampler(n, batch, 0, drop_last=drop_last))
    assert {epoch for step in keys(n, batch, epoch=3) for epoch, _ in step} == {3}
    assert keys(n, batch) == keys(n, batch) != keys(n, batch, epoch=1)


def test_without_shuffling():
    assert keys(5, 2, drop_last=False, shuffle=False) == [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(0, 4)]]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_see_what_one_process_sees(world):
    whole = keys(45, 8)
    parts = [keys(45, 8, world=world, rank=rank) for rank in range(world)]
    assert [sum((part[step] for part in parts), []) for step in range(len(whole))] == whole


@pytest.mark.parametrize(("n", "batch", "world"), [(45, 8, 2), (3, 8, 4), (1, 8, 4), (41, 8, 4), (7, 4, 4)])
def test_the_short_batch_is_kept_and_shared(n, batch, world):
    whole = keys(n, batch, drop_last=False)
    parts = [keys(n, batch, drop_last=False, world=world, rank=rank) for rank in range(world)]
    joined = [sum((part[step] for part in parts), []) for step in range(len(whole))]
    assert joined[:-1] == whole[:-1]
    short = whole[-1]
    missing = -len(short) % world
    order = [key for step in whole for key in step]
    assert joined[-1] == short + [order[i % n] for i in range(missing)]
    assert len({len(part[-1]) for part in parts}) == 1


def test_a_position_in_the_middle():
    sampler = EpochSampler(30, 4, seed=5)
    sampler.set_position(2, 3)
    assert list(sampler) == keys(30, 4, epoch=2)[3:]
    assert len(sampler) == 7
    sampler.set_position(2, 7)
    assert list(sampler) == []


def test_sampler_mistakes():
    with pytest.raises(UserError, match=r"fewer than one batch of 8; give a --batch-size of at most"):
        EpochSampler(7, 8, 0)
    with pytest.raises(UserError, match=r"--batch-size 9 cannot be divided among 2 processes"):
        EpochSampler(70, 9, 0, world=2)
    assert len(EpochSampler(7, 8, 0, drop_last=False)) == 1


# Loader


def test_workers_and_positions_change_nothing():
    data = TwoViews(digits(), get_preset("digits"), 12, seed=1)
    sampler = EpochSampler(len(data), 8, seed=1)
    alone, helped = make_loader(data, sampler), make_loader(data, sampler, workers=2)
    state = torch.get_rng_state()
    epochs = []
    for epoch in (0, 1):
        sampler.set_position(epoch)
        epochs.append(collect(alone))
        equal(epochs[-1], collect(helped))
    sampler.set_position(0, 3)
    equal(epochs[0][3:], collect(helped))
    equal(epochs[0][3:], collect(alone))
    sampler.set_position(1)
    for batch in helped:  # left in the middle, with batches of this epoch still on their way
        equal([batch], epochs[1][:1])
        break
    sampler.set_position(0)
    equal(epochs[0], collect(helped))
    assert torch.equal(torch.get_rng_state(), state)
    assert epochs[0][0]["q"].shape == (8, 1, 12, 12)
    assert not torch.equal(epochs[0][0]["index"], epochs[1][0]["index"])
    assert len(alone) == len(helped) == 5


def test_two_ranks_load_what_one_process_loads():
    data = TwoViews(digits(), get_preset("digits"), 12, seed=1)
    whole = collect(make_loader(data, EpochSampler(len(data), 8, seed=1)))
    ranks = [collect(make_loader(data, EpochSampler(len(data), 8, 1, world=2, rank=rank))) for rank in (0, 1)]
    joined = [{name: torch.cat([a[name], b[name]]) for name in a} for a, b in zip(*ranks, strict=True)]
    equal(whole, joined)


def test_a_workers_mistake_stays_one_sentence():
    data = TwoViews(Holes(8, range(8)), get_preset("digits"), 4, 0)
    for workers in (0, 1):
        with pytest.raises(UserError) as caught:
            collect(make_loader(data, EpochSampler(8, 4, 0), workers=workers))
        assert str(caught.value).startswith("none of 8 images tried in holes can be read, first holes[")
        assert "\n" not in str(caught.value)


class Whoami(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, key):
        return {"pid": os.getpid(), "parent": os.getppid(), "threads": torch.get_num_threads(), "bad": -1}


def test_workers_outlive_signals_to_the_job_and_end_with_the_loader():
    loader = make_loader(Whoami(), EpochSampler(64, 1, 0), workers=1)
    batches = iter(loader)
    first = next(batches)
    worker = first["pid"].item()
    assert first["parent"].item() == os.getpid()
    assert first["threads"].item() == 1
    # Sent by another process, as a scheduler does; torch would raise in this one.
    for name in ("TERM", "INT", "USR1", "HUP"):
        kill = f"import os, signal; os.kill({worker}, signal.SIG{name})"
        subprocess.run([sys.executable, "-c", kill], check=True)
    assert {batch["pid"].item() for batch in batches} == {worker}
    assert {batch["pid"].item() for batch in loader} == {worker}
    process = loader._iterator._workers[0]
    process.terminate()  # from the parent it still ends the worker, as torch's shutdown needs
    process.join(10)
    assert process.exitcode == 0


# Normalisation and bad images


@pytest.mark.parametrize("channels", [1, 3])
def test_normalise_equals_torchvision_bit_for_bit(channels):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 9, 7, channels), dtype=np.uint8)
    mean, std = (0.485, 0.456, 0.406)[:channels], (0.229, 0.224, 0.225)[:channels]
    published = T.Compose([T.ToTensor(), T.Normalize(mean, std)])
    expected = torch.stack([published(image) for image in pixels])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    before = images.clone()
    assert torch.equal(normalise(images, mean, std), expected)
    assert torch.equal(normalise(images, torch.tensor(mean), torch.tensor(std)), expected)
    assert torch.equal(images, before)
    with pytest.raises(UserError, match=f"the images have {channels} channels: give --mean and --std as many"):
        normalise(images, (0.5,) * 2, (0.5,) * 2)


def test_bad_images_are_named_once_and_limited():
    source, bad = Holes(50, []), BadImages(limit=3)

    def batch(*numbers):
        return {"bad": torch.tensor(numbers)}

    assert bad.note(batch(-1, -1), source) == []
    assert bad.note(batch(7, -1, 3), source) == ["holes[3]", "holes[7]"]
    assert bad.note(batch(7, 9, 9), source) == ["holes[9]"]
    resumed = BadImages(limit=3)
    resumed.load_state_dict(bad.state_dict())
    for counter in (bad, resumed):
        assert counter.note(batch(9, 3), source) == []
        with pytest.raises(UserError, match=r"4 images of holes cannot be read, the limit is 3 \(last: holes\[1\]\)"):
            counter.note(batch(1), source)


def test_a_worker_whose_parent_is_gone_says_nothing(monkeypatch, capsys):
    """Also where the parent's connections are closed and it is not yet gone, as the system ends a process."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(loader_module, "_TELLS_THE_SENDER", False)
    monkeypatch.setattr(loader_module, "PARTING_SECONDS", 0.2)
    parent, errors = os.getppid(), [ConnectionResetError("cut off"), EOFError("cut off"), ValueError("another")]

    def told(error):
        sys.excepthook(type(error), error, None)
        return capsys.readouterr().err

    loader_module._prepare_worker(0)
    assert all(str(error) in told(error) for error in errors)  # the parent lives
    for error in errors[:2]:
        parents = iter([parent] * 3)
        monkeypatch.setattr(os, "getppid", lambda parents=parents: next(parents, 1))
        assert told(error) == ""
    assert all(told(error) == "" for error in errors)


ORPHAN = """
import multiprocessing, os, time
from moco.data import loader

def work(parent):
    while os.getppid() == parent:
        time.sleep(0.01)
    loader._prepare_worker(0)
    time.sleep(200)

process = multiprocessing.get_context("fork").Process(target=work, args=(os.getpid(),))
process.start()
print(process.pid, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: elsewhere workers are spawned")
def test_a_worker_whose_parent_was_killed_as_it_was_born_ends():
    made = subprocess.run([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, timeout=60)  # until both have ended
    assert made.returncode == -signal.SIGKILL
    assert int(made.stdout)
