"""Averages of checkpoints: the mean, which files, BatchNorm recomputed; and BEiT-3's index of a folder."""

import json

import pytest
import torch
from conftest import load, records
from support.finetuning import state_of, tune
from support.probing import probe_once

from moco import average as average_door
from moco import data, run_folder
from moco import files as disk
from moco.data.__main__ import main as data_main
from moco.data.sources.files import INDEX_NAME
from moco.errors import UserError
from moco.eval import finetune, linear_checkpoint
from moco.models.inputs import normalise
from moco.weights import average, describe
from moco.weights.read import open_backbone

pytestmark = pytest.mark.usefixtures("restored")


@pytest.fixture(scope="module")
def tuned(folder, tmp_path_factory):
    """A fine-tuning that kept each of its three epochs."""
    save_dir = tmp_path_factory.mktemp("tuned")
    tune(folder, save_dir, "--epochs", 3, "--train-percent", 50, "--save-ckpt-freq", 1, "--lr-backbone", 0.1)
    return save_dir


def test_weights_are_the_mean_and_batchnorm_is_measured_anew(folder, tuned, capsys):
    out = tuned / "mean.pth.tar"
    assert (
        average_door.main([str(tuned), "--last", "2", "--data", str(folder), "-b", "20", "-j", "0", "--out", str(out)])
        == 0
    )
    said = capsys.readouterr().out
    assert "averaged 2 checkpoints: checkpoint_semisup_0001.pth.tar checkpoint_semisup_0002.pth.tar" in said
    assert "BatchNorm statistics recomputed on 60 images" in said
    files = [state_of(tuned, finetune.KEPT.format(epoch))["state_dict"] for epoch in (1, 2)]
    found = disk.read(str(out))["state_dict"]
    assert "--size 16 --channels 3 --mean 0.485" in said.partition("settings of ")[2]
    assert disk.read(str(out))["run"]["images"]["size"] == 16  # an average says it, too
    assert found.keys() == files[0].keys()
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    for name, value in found.items():
        if not name.endswith(statistics):
            torch.testing.assert_close(value, (files[0][name] + files[1][name]) / 2, msg=name)
    # the first layer's input does not depend on BatchNorm: its statistics are those of the images themselves
    like = open_backbone(str(out))
    source = data.open_sources(path=str(folder)).pretrain
    views = data.TwoViews(source, data.probe_preset(True), 16, seed=0)
    sampler = data.EpochSampler(60, 20, seed=0)
    mean, std = data.channel_statistics(None, 3, None, None)
    batches = [torch.stack([views[key]["q"] for key in keys]) for keys in sampler]
    first = [like.encoder.conv1[0](normalise(batch, mean, std)) for batch in batches]
    wanted = torch.stack([x.mean((0, 2, 3)) for x in first]).mean(0)
    torch.testing.assert_close(found["module.conv1.1.running_mean"], wanted.detach(), rtol=1e-4, atol=1e-5)
    assert int(found["module.conv1.1.num_batches_tracked"]) == 3
    tune(folder, tuned, "--evaluate", "--resume", out, "--train-percent", 50, result="evaluate.json")
    assert not any(line.startswith("warning") for line in describe.describe_file(str(out)))


def test_the_best_are_chosen_by_their_accuracy(tuned, tmp_path):
    paths = [tuned / finetune.KEPT.format(epoch) for epoch in range(3)]
    for path, acc1 in zip(paths, (50.0, 20.0, 40.0), strict=True):
        state = disk.read(str(path))
        torch.save({**state, "acc1": acc1}, tmp_path / path.name)
    best = [finetune.KEPT.format(epoch) for epoch in (0, 2)]
    assert average.choose_checkpoints(str(tmp_path), None, 2) == [str(tmp_path / name) for name in best]
    with pytest.raises(UserError, match="holds 3 checkpoints of epochs with a known accuracy and 4 are asked for"):
        average.choose_checkpoints(str(tmp_path), None, 4)


def test_a_pretrainings_query_encoder_alone_is_averaged(image_folder, in_process, tmp_path, capsys):
    words = ["-a", "test_resnet", "--size", 16, "-b", 8, "--moco-k", 16, "--moco-dim", 8, "-j", 0, "--seed", 1,
             "--epochs", 3, "--knn-every", 1, "--knn-k", 3, "--lr", 0.1]  # fmt: skip
    assert in_process(image_folder, *words, "--save-dir", tmp_path) == 0
    logged = average._logged(str(tmp_path))
    assert sorted(logged) == [1, 2, 3]
    (tmp_path / "old").mkdir()
    lines = records(tmp_path)
    earlier = [{**r, "epoch": r.pop("finished_epochs", r["epoch"])} for r in lines]  # as older versions wrote them
    (tmp_path / "old" / "log.jsonl").write_text("\n".join(map(json.dumps, earlier)))
    assert average._logged(str(tmp_path / "old")) == logged
    best = [name for _, name in sorted((knn, f"checkpoint_{epoch - 1:04d}.pth.tar") for epoch, knn in logged.items())]
    chosen = average.choose_checkpoints(str(tmp_path), None, 2)
    assert {logged[int(path[-12:-8]) + 1] for path in chosen} == {logged[int(name[11:15]) + 1] for name in best[1:]}
    assert average_door.main([str(tmp_path), "--last", "3", "--data", str(image_folder), "-b", "8", "-j", "0"]) == 0
    assert "augmentation crop and flip" in capsys.readouterr().out
    found = disk.read(str(tmp_path / "averaged.pth.tar"))
    assert all(name.startswith("module.encoder_q.") for name in found["state_dict"])
    name = "module.encoder_q.fc.weight"
    files = [load(tmp_path / f"checkpoint_000{epoch}.pth.tar")["state_dict"][name] for epoch in range(3)]
    torch.testing.assert_close(found["state_dict"][name], sum(files) / 3)
    assert "encoder_q of" in open_backbone(str(tmp_path / "averaged.pth.tar")).summary
    assert run_folder.newest(str(tmp_path)) == str(tmp_path / "checkpoint_0002.pth.tar")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["TUNED", "--last", "2", "--best", "2"], "two choices of checkpoints"),
        (["TUNED", "--last", "1"], "--last must be at least 2"),
        (["A", "B", "--last", "2"], "--last chooses from the folder of a run"),
        (["TUNED", "--last", "9"], "holds 3 checkpoints of epochs and 9 are asked for"),
        (["TUNED/checkpoint_semisup_0000.pth.tar"], "needs two checkpoints or more"),
        (["TUNED/checkpoint_semisup_0000.pth.tar", "TUNED/none"], "no checkpoint at"),
        (["TUNED", "--last", "2"], "give training images by --data"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(words, what, tuned, capsys):
    try:
        code = average_door.main([word.replace("TUNED", str(tuned)) for word in words])
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr().err
    assert code == 2
    assert what in said
    assert said.count("\n") == 1


def test_a_probes_classifiers_are_averaged_and_its_encoder_stays(folder, tmp_path, capsys):
    (tmp_path / linear_checkpoint.KEPT_PROBE.format(3)).write_bytes(b"of another run")
    probe_once(folder, tmp_path, "--epochs", 1, "--features", "cached", "--lr", 0.3)
    assert (tmp_path / linear_checkpoint.KEPT_PROBE.format(3)).exists()  # a run that keeps none removes none
    words = ["--epochs", 3, "--save-ckpt-freq", 1, "--features", "cached", "--lr", 0.3, "--seed", 3, "--overwrite"]
    probe_once(folder, tmp_path, *words)
    assert average_door.main([str(tmp_path), "--last", "2"]) == 0
    said = capsys.readouterr().out
    assert "averaged 2 checkpoints: checkpoint_lincls_0001.pth.tar checkpoint_lincls_0002.pth.tar" in said
    assert "BatchNorm statistics are equal in all files" in said
    files = [state_of(tmp_path, linear_checkpoint.KEPT_PROBE.format(epoch)) for epoch in range(3)]
    found = state_of(tmp_path, "averaged.pth.tar")["state_dict"]
    for name, value in found.items():
        mean = (files[1]["state_dict"][name] + files[2]["state_dict"][name]) / 2
        torch.testing.assert_close(value, mean if name.startswith("module.fc") else files[0]["state_dict"][name])
    assert not torch.equal(found["module.fc.weight"], files[2]["state_dict"]["module.fc.weight"])
    best = average.choose_checkpoints(str(tmp_path), None, 2)
    scores = sorted((file["acc1"], linear_checkpoint.KEPT_PROBE.format(epoch)) for epoch, file in enumerate(files))
    assert best == sorted(str(tmp_path / name) for _, name in scores[1:])
    words = ["--resume", tmp_path / "averaged.pth.tar", "--seed", 3]
    found = probe_once(folder, tmp_path, "--evaluate", *words)
    assert found["mode"] == "evaluate"
    assert state_of(tmp_path, "averaged.pth.tar")["run"]["classes"] == ["class0", "class1", "class2"]
    with pytest.raises(UserError, match="is an average, which no training goes on from: give it with --evaluate"):
        probe_once(folder, tmp_path, "--epochs", 4, *words)
    (tmp_path / finetune.KEPT.format(0)).write_bytes(b"")
    with pytest.raises(UserError, match="holds checkpoints of several programs"):
        average.choose_checkpoints(str(tmp_path), 2, None)
    torch.save({**files[1], "run": {**files[1]["run"], "classes": ["a", "b", "c"]}}, tmp_path / "other")
    with pytest.raises(UserError, match=r"the outputs of .* are other classes: average checkpoints of one run"):
        average.average([str(tmp_path / linear_checkpoint.KEPT_PROBE.format(0)), str(tmp_path / "other")])
    for arch in ("", "resnet18"):
        torch.save({**files[1], "arch": arch}, tmp_path / "other")
        with pytest.raises(UserError, match=f"says that it is of -a 'test_resnet' and .*other of -a '{arch}': average"):
            average.average([str(tmp_path / linear_checkpoint.KEPT_PROBE.format(0)), str(tmp_path / "other")])
    torch.save({**files[1], "run": {**files[1]["run"], "lr": 3.0}}, tmp_path / "other")
    with pytest.raises(UserError, match=r"with the classifier of --lr 0.3 and .*other with that of --lr 3.0"):
        average.average([str(tmp_path / linear_checkpoint.KEPT_PROBE.format(0)), str(tmp_path / "other")])


def test_another_network_is_named(tuned, tmp_path):
    path = tuned / finetune.KEPT.format(0)
    state = disk.read(str(path))
    state["state_dict"]["module.fc.bias"] = torch.zeros(7)
    torch.save(state, tmp_path / "other.pth.tar")
    with pytest.raises(UserError, match=r"other.pth.tar is of another network than .*: module.fc.bias differs"):
        average.average([str(path), str(tmp_path / "other.pth.tar")])
    torch.save({"weights": 1}, tmp_path / "none.pth.tar")
    with pytest.raises(UserError, match="is no checkpoint of this project"):
        average.average([str(path), str(tmp_path / "none.pth.tar")])


def test_weights_of_no_use_are_not_averaged(tuned, tmp_path):
    path = str(tuned / finetune.KEPT.format(0))
    for change, holds in (
        (lambda w: w.fill_(torch.nan), "NaN or infinity"),
        (lambda w: w.long(), "int64 numbers"),
        (lambda w: w.to(torch.complex64), "complex64 numbers"),
    ):
        state = disk.read(path)
        state["state_dict"]["module.fc.weight"] = change(state["state_dict"]["module.fc.weight"])
        torch.save(state, tmp_path / "odd.pth.tar")
        with pytest.raises(UserError, match=rf"odd.pth.tar cannot be used: module.fc.weight holds {holds}; take"):
            average.average([path, str(tmp_path / "odd.pth.tar")])


def test_an_average_is_of_one_encoder_and_keeps_its_changes(tuned, tmp_path):
    path = str(tuned / finetune.KEPT.format(0))
    state = disk.read(path)
    assert average.average([path, path])[0]["run"]["changes"] == {}  # of ours, so nothing is left to guess
    state["run"]["changes"] = {"bare_stem": 1}
    torch.save(state, tmp_path / "bare.pth.tar")
    found = average.average([str(tmp_path / "bare.pth.tar")] * 2)[0]
    assert found["run"]["changes"] == {"bare_stem": 1}
    with pytest.raises(UserError, match="is of an encoder with no change and .*bare.pth.tar of one with neither ReLU"):
        average.average([path, str(tmp_path / "bare.pth.tar")])
    del state["run"], state["scaler"]  # another project's, of which the reader finds out
    torch.save(state, tmp_path / "theirs.pth.tar")
    assert "changes" not in average.average([str(tmp_path / "theirs.pth.tar")] * 2)[0]["run"]


# ---------------------------------------------------------------------------------------------------- the index


def test_an_index_is_made_and_read(folder, tmp_path, capsys):
    assert data_main(["index", str(folder), "--out", str(tmp_path)]) == 0
    assert f"{INDEX_NAME.format('train')}: 60 images" in capsys.readouterr().out
    lines = (tmp_path / INDEX_NAME.format("val")).read_text().splitlines()
    assert [json.loads(line)["label"] for line in lines] == [0] * 5 + [1] * 5 + [2] * 5
    read = data.open_sources(
        path=str(tmp_path / INDEX_NAME.format("train")), val_path=str(tmp_path / INDEX_NAME.format("val"))
    )
    direct = data.open_sources(path=str(folder))
    assert read.train is not None and read.val is not None and direct.val is not None
    assert read.train.labels.tolist() == direct.train.labels.tolist()
    assert read.val.load(7).tobytes() == direct.val.load(7).tobytes()


def test_beit3s_own_index_has_paths_from_the_datas_folder(folder):
    path = folder / "theirs.jsonl"
    path.write_text(
        '{"image_path": "/train/class1/1_0.png", "label": 1}\n{"image_path": "/val/class0/0_0.png", "label": 0}'
    )
    source = data.open_sources(path=str(path)).pretrain
    path.unlink()
    assert source.labels.tolist() == [1, 0]
    assert source.load(1).size == (16, 16)


def test_mistakes_with_an_index(tmp_path, capsys):
    assert data_main(["index", str(tmp_path)]) == 2
    assert "has no folder train, val or test" in capsys.readouterr().err
    (tmp_path / "x.jsonl").write_text('{"image_path": "a.png"}\n')
    with pytest.raises(UserError, match="line 1 of the index .* make it by python -m moco.data index"):
        data.open_sources(path=str(tmp_path / "x.jsonl"))
