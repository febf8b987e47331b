"""What the report finds in folders: each program's results as rows, damaged files as rows too, nothing slowly."""

import json
import os
import shutil
import time

import pytest

import main_lincls
from moco.cli import parse_lincls
from moco.report import found, walk


def write(folder, name, **entries):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(entries))


def tables(folder):
    """Rows as dictionaries, by the title of their table."""
    made = found.tables(str(folder))
    assert all(len(row) == len(table.columns) for table in made for row in table.rows)
    return {table.title: [dict(zip(table.columns, row, strict=True)) for row in table.rows] for table in made}


def note(folder, title):
    return next(table.note for table in found.tables(str(folder)) if table.title == title)


PROBE = {"mode": "lincls", "pretrained": "", "acc1": 86.8, "acc5": 99.4, "best_acc1": 87.0, "lr": 3.0, "epochs": 5}


@pytest.mark.usefixtures("alone", "restored")
def test_what_the_probe_and_knn_write_is_read(image_folder, pretrained, tmp_path):
    shutil.copy(pretrained, tmp_path / "checkpoint_0001.pth.tar")
    words = [image_folder, "-a", "test_resnet", "-b", 4, "-j", 0, "--save-dir", tmp_path / "probe", "--size", 16]
    words += ["--pretrained", tmp_path / "checkpoint_0001.pth.tar", "--seed", 0]
    for more in (["--features", "cached", "--lr", 1, 0.1, "--epochs", 1], ["--knn", "--knn-k", 2, 3]):
        assert main_lincls.worker(parse_lincls([*map(str, words), *map(str, more)])) == 0
    seen, result = tables(tmp_path), json.loads((tmp_path / "probe" / "result.json").read_text())
    (probe,) = seen["Linear probe"]
    assert (probe["checkpoint"], probe["result file"]) == ("checkpoint_0001.pth.tar", "probe/result.json")
    assert (probe["top-1, %"], probe["chosen on"]) == (f"{result['acc1']:.2f}", "the held-out images")
    assert "top-5, %" not in probe  # of so few classes there is none
    assert "optimistic" in note(tmp_path, "Linear probe")
    rates = seen["Linear probe: each learning rate"]
    assert [row["lr"] for row in rates] == ["1", "0.1"]
    assert [row["outcome"] for row in rates].count("chosen") == 1
    assert [row["k"] for row in seen["k-NN"]] == ["2", "3"]
    own = json.loads((tmp_path / "probe" / "knn.json").read_text())
    assert [row["top-1, %"] for row in seen["k-NN"]] == [f"{own['knn_2']:.2f}", f"{own['knn_3']:.2f}"]


def test_a_result_names_its_checkpoint_also_after_the_folder_was_moved(tmp_path):
    named = ("old/run/a.pth.tar", "/elsewhere/other/b.pth.tar", str(tmp_path / "run" / "c.pth.tar"), "")
    for i, path in enumerate(named):
        write(tmp_path / "run" / f"probe{i}", "result.json", **{**PROBE, "pretrained": path})
    moved = tmp_path / "old" / "run"
    (tmp_path / "old").mkdir()
    (tmp_path / "run" / "a.pth.tar").touch()
    os.rename(tmp_path / "run", moved)
    by_file = {row["result file"]: row["checkpoint"] for row in tables(moved)["Linear probe"]}
    assert by_file == {"probe0/result.json": "a.pth.tar", "probe1/result.json": "other/b.pth.tar",
                       "probe2/result.json": "run/c.pth.tar", "probe3/result.json": "random weights"}  # fmt: skip
    os.utime(moved / "a.pth.tar", (time.time() + 60,) * 2)
    assert "a.pth.tar (written after this result)" in {row["checkpoint"] for row in tables(moved)["Linear probe"]}


def test_fine_tunings_have_a_row_each_and_their_mean_over_seeds(tmp_path):
    settings = {"train_percent": 10, "weights": "finetune", "lr_backbone": 0.05, "lr_classifier": 0.5}
    for seed, acc1 in enumerate((50.0, 54.0)):
        about = {"mode": "semisup", "pretrained": "", "seed": seed, "epochs": 3, "train_images": 400}
        write(tmp_path / f"seed{seed}", "result.json", **about, settings=settings, acc1=acc1, val_acc1=60.0,
              acc_5shot=70.0, ci95_5shot=1.5)  # fmt: skip
    rows = tables(tmp_path)
    tuned = rows["Fine-tuning on a share of the labels"]
    assert [(row["labels, %"], row["seed"], row["test top-1, %"]) for row in tuned] == [
        ("10", "0", "50.00"), ("10", "1", "54.00")
    ]  # fmt: skip
    assert tuned[0]["few-shot, %"] == "5-shot 70.00 ± 1.50"
    (mean,) = rows["Fine-tuning: mean ± standard deviation over seeds"]
    assert (mean["seeds"], mean["test top-1, %"]) == ("2", f"52.00 ± {8**0.5:.2f}")


def test_a_sweep_is_one_table_and_its_trials_are_no_rows(tmp_path):
    sweep = tmp_path / "sweeps" / "rates"
    sweep.mkdir(parents=True)
    lines = ["stage,lr,seed,status,exit_code,seconds,val_acc1,acc1,folder"]
    lines += [f"select,{lr},{seed},done,0,9.5,{lr + seed},,out/trials/{lr}-{seed}" for lr in (1, 3) for seed in (0, 2)]
    lines += ["report,3,0,done,0,9.5,,40.0,out/trials/3-0", "report,3,2,failed,1,9.5,,,out/trials/3-2"]
    (sweep / "results.csv").write_text("\n".join(lines) + "\n")
    write(sweep / "trials" / "1-0", "result.json", **{**PROBE, "pretrained": "net/work.pth"})
    made = found.tables(str(tmp_path))
    assert [table.title for table in made] == ["Sweep: sweeps/rates"]
    assert made[0].columns == ["lr", "val_acc1 (selection)", "selected", "acc1"]
    assert made[0].rows == [["1", "2.00 ± 1.41", "", ""], ["3", "4.00 ± 1.41", "yes", "40.00 (1 of 2 seeds)"]]
    assert made[0].note.startswith("Checkpoint: net/work.pth. ± is the standard deviation over 2 seeds.")
    assert made[0].note.endswith("1 trials are not done, the first out/trials/3-2: failed.")
    (sweep / "results.csv").write_text("\n".join(lines)[:-20])
    assert "columns" in tables(tmp_path)["Files that cannot be read"][0]["what is wrong"]
    assert len(tables(tmp_path)["Linear probe"]) == 1  # the trials are what is left of it


def test_other_results_have_their_tables(tmp_path):
    about = {"pretrained": "a/b/c.pth.tar"}
    write(tmp_path, "few_shot.json", mode="few_shot", **about, acc_1shot=52.8, ci95_1shot=2.4, way=5, episodes=600)
    write(tmp_path, "lr_find.json", mode="lr_find", **about, suggestion=0.001, edge="lowest", steps=66, warning="w")
    write(tmp_path, "retrieval.json", checkpoint="a/b/c.pth.tar", features={"map": 38.2}, head={"map": 33.0}, images=9)
    write(tmp_path, "evaluate.json", **{**PROBE, "mode": "evaluate"})
    rows = tables(tmp_path)
    assert rows["Few-shot"][0]["accuracy, %"] == "52.80 ± 2.40"
    assert rows["Learning-rate range test"][0]["lowest loss at"] == "close to the lowest rate"
    assert [row["mAP, %"] for row in rows["Retrieval and clustering"]] == ["38.20", "33.00"]
    assert {row["checkpoint"] for title in rows for row in rows[title]} == {
        "b/c.pth.tar",
        "the one that --resume named",
    }


def test_detection_is_read_as_a_summary_else_by_training(tmp_path):
    figures = {name: {"mean": 50.04, "std": 1.0, "trials": [49.0, 51.0]} for name in ("AP50", "AP", "AP75")}
    for number in range(2):
        write(tmp_path / "voc" / f"trial_{number}", "results.json", bbox={"AP": 1.0, "AP50": 2.0, "AP75": 3.0})
    (tmp_path / "voc" / "trial_1" / "results.json").unlink()
    lines = ('{"iteration": 9, "bbox/AP": 7.5, "bbox/AP50": 8.5}', '{"iteration": 10, "loss": 1}', '{"bbox/AP": ')
    (tmp_path / "voc" / "trial_1" / "metrics.json").write_text("\n".join(lines))
    (tmp_path / "voc" / "trial_1" / "config.yaml").write_text("MODEL:\n  WEIGHTS: out/backbone.pkl\n")
    done, going = tables(tmp_path)["Detection"]
    assert (done["AP50"], done["state"], done["checkpoint"]) == ("2.0", "done", "not recorded")
    assert (going["AP"], going["state"], going["checkpoint"]) == ("7.5", "at iteration 9", "out/backbone.pkl")
    published = {"MoCo v2, 200 epochs": ["5", 82.4, 57.0, 63.6]}
    about = {"checkpoint": "x/y.pth.tar", "config": "voc.yaml", "opts": [], "published": published}
    write(tmp_path / "voc", "summary.json", **about, **figures)
    theirs, ours = tables(tmp_path)["Detection"]
    assert (theirs["checkpoint"], theirs["AP"]) == ("MoCo v2, 200 epochs (published)", "57.0")
    assert (ours["checkpoint"], ours["trials"], ours["AP"]) == ("x/y.pth.tar", "2", "50.0 ± 1.0")


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b'{"mode": "lincls", "acc1"', "it is no whole JSON"),
        (b"\xff\xfe", "it is no text"),
        (b'{"mode": "lincls", "acc1": "high"}', "'high' under 'acc1' is no number"),
        (b'{"mode": "lincls", "per_lr": [{"lr": []}]}', "[] under 'lr' is no number"),
        (b"[" * 100_000, "it is no whole JSON"),
        (b'{"mode": "lincls", "acc1": 1%s}' % (b"0" * 400), "is no number"),
    ],
    ids=["cut", "bytes", "word", "row", "deep", "huge"],
)
def test_a_damaged_file_is_a_row(content, wrong, tmp_path):
    (tmp_path / "result.json").write_bytes(content)
    write(tmp_path / "sound", "result.json", **PROBE)
    rows = tables(tmp_path)
    assert rows.keys() == {"Linear probe", "Files that cannot be read"}
    (row,) = rows["Files that cannot be read"]
    assert row["result file"] == "result.json"
    assert wrong in row["what is wrong"]
    assert len(rows["Linear probe"]) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("summary.json", '{"config": "x", "AP": {"mean": 1, "trials": 3}}'),
        ("results.csv", "stage,lr,seed,status,exit_code,seconds,folder\nselect,1,0,done,0,1,f\n"),
        ("results.csv", f"stage,seed,status,exit_code,seconds,knn,folder\nselect,0,done,0,1,{'1' * 200_000},f\n"),
    ],
    ids=["trials", "no-figure", "long"],
)
def test_values_of_other_kinds_are_a_row(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    (row,) = tables(tmp_path)["Files that cannot be read"]
    assert row["result file"] == name


def test_a_trial_that_diverged_is_no_part_of_a_mean(tmp_path):
    rows = "".join(f"select,1,{seed},done,0,1,{knn},f{seed}\n" for seed, knn in enumerate(["nan", "inf", "50", "60"]))
    (tmp_path / "results.csv").write_text("stage,lr,seed,status,exit_code,seconds,knn,folder\n" + rows)
    (row,) = tables(tmp_path)["Sweep: ."]
    assert row["knn (selection)"] == "55.00 ± 7.07 (2 of 4 seeds)"


def test_files_of_others_are_passed_over(tmp_path):
    for name in (*found.EVALUATIONS, *found.TRIALS):
        (tmp_path / name).write_text('{"acc": {"top": 1}}' if name.endswith("json") else "a,b\n1,2\n")
    (tmp_path / "results.png").touch()  # of nobody's sweep
    os.mkfifo(tmp_path / "pipe")
    assert found.tables(str(tmp_path)) == []
    assert found.pictures(str(tmp_path)) == []


def test_a_pipe_is_not_waited_at(tmp_path):
    os.mkfifo(tmp_path / "knn.json")
    assert tables(tmp_path)["Files that cannot be read"][0]["result file"] == "knn.json"


def test_a_folder_of_images_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(walk, "OF_ONE", 30)
    monkeypatch.setattr(walk, "ENTRIES", 200)
    for kind in range(10):
        folder = tmp_path / "images" / f"class{kind}"
        folder.mkdir(parents=True)
        for number in range(40):
            (folder / f"{number}.png").touch()
    write(tmp_path / "probe", "result.json", **PROBE)
    os.symlink(tmp_path, tmp_path / "probe" / "round")
    seen = walk.Walk(str(tmp_path))
    places = list(seen)
    assert sum(len(place.files) + len(place.folders) for place in places) <= 200 < 10 * 40
    assert len(tables(tmp_path)["Linear probe"]) == 1
    assert "name a subfolder" in note(tmp_path, "Not looked at")


def test_pictures_are_found_with_their_folders(tmp_path):
    for name in ("confusion.png", "alike/neighbours.png", "hard/negatives.png", "probe/lr_find.png",
                 "sweep/results.png", "sweep/trials/a/confusion.png"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "sweep" / "results.csv").touch()
    titles = ["Confusion matrix", "Neighbours: alike", "Hard negatives: hard", "Learning-rate range test: probe",
              "Sweep: sweep"]  # fmt: skip
    assert [title for title, _ in found.pictures(str(tmp_path))] == titles
    assert all(os.path.isfile(path) for _, path in found.pictures(str(tmp_path)))
