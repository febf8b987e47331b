"""python -m moco.negatives: what it counts and shows is what the loss and the run have."""

import dataclasses
import json
import math
import re
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SYNCO, TINY, load, rounding

import moco
from moco import cli, data, distributed, negatives
from moco.config import SynCoConfig
from moco.eval.mined import command as mined
from moco.eval.mined import curves, picture
from moco.eval.mined.images import Sample
from moco.eval.mined.measure import Mined, look, measure
from moco.eval.mined.queue_run import KEY_VIEW, QueueRun, open_queue
from moco.kernels import contrastive_loss
from moco.models.key_queue import EMPTY
from moco.pictures import charts
from moco.pictures.page import ASSETS

WITHOUT_SHUFFLE = ["--no-shuffle-bn", "--bn-splits", "1", "--moco-m", "1"]  # a key depends on its batch alone
SYNCO_OF_TINY = SynCoConfig(4, 4, 4, 2, 2, 2)


@pytest.fixture(scope="module")
def folder(hard_folder, tmp_path_factory) -> Path:
    """A run's folder with three checkpoints: SynCo, 24 images, K 20, H 8; the key encoder never moves."""
    from main_pretrain import worker

    path = tmp_path_factory.mktemp("run")
    words = [*TINY, *SYNCO, *WITHOUT_SHUFFLE, "--epochs", "3", "--keep", "0", "--save-dir", path, hard_folder]
    assert distributed.launch(worker, cli.parse_pretrain([*map(str, words)])) == 0
    return path


@pytest.fixture(scope="module")
def source(hard_folder) -> data.Source:
    return data.open_sources(None, str(hard_folder)).pretrain


@pytest.fixture(scope="module")
def run(folder) -> QueueRun:
    return open_queue(str(folder / "checkpoint_0002.pth.tar"))


@pytest.fixture(scope="module")
def compared(run, source) -> Mined:
    """All images of the run against its queue."""
    sample = Sample(run.views(source)[0], run.epoch, range(len(source)))
    return mined.compared(run, sample, source, Namespace(recipe=None, n_hard=None))


def command(*words: object) -> int:
    return negatives.main([*map(str, words)])


# ------------------------------------------------------------------------------------------- a run as it was


def test_the_view_of_each_queue_row_makes_the_row_anew(run, source):
    """The key encoder that is in the file, its first weights as m is 1, gives all 20 rows from these views."""
    seen, views = run.views_of_rows(source), run.views(source)[0]
    pointer, K = int(run.file.tensors["queue_ptr"]), len(run.queue)
    assert sorted(seen) == list(range(K)) and {view for _, view in seen.values()} == {KEY_VIEW}
    for end in (0, 8):  # the last two batches, as they were
        rows = [(pointer - end - back) % K for back in range(8, 0, -1)]
        keys = torch.stack([views[seen[row][0], int(run.ids[row])]["k"] for row in rows])
        _, made = run.encode(keys, keys, torch.device("cpu"))
        torch.testing.assert_close(made, run.queue[rows], rtol=0, atol=1e-5)


def test_views_are_unknown_where_the_order_names_other_images(run, source):
    other = dataclasses.replace(run, ids=run.ids.roll(1))
    assert other.views_of_rows(source) == {}


def test_images_that_are_not_of_the_run_are_told(run, source, image_folder):
    assert run.other_images(source) == ""
    assert "24 images of" in run.other_images(data.open_sources(None, str(image_folder)).pretrain)


# ------------------------------------------------------------------------------------------- what is counted


def test_synthetic_negatives_are_those_of_the_loss(compared):
    run = compared.run
    made = moco.hard_negatives(
        compared.q, run.queue, SYNCO_OF_TINY, 8, seed=3, call=run.draw, ids=compared.ids, queue_ids=run.ids
    )
    (part,) = compared.parts()
    assert list(part.synthetic) == list(made)
    for kind, found in part.synthetic.items():
        expected = torch.einsum("nc,nsc->ns", compared.q, made[kind])
        torch.testing.assert_close(found.cosine, expected, rtol=0, atol=rounding(64), msg=kind)


def test_an_example_is_its_parts_in_their_weights(compared):
    """h = u / |u| from the parts, and noise apart, whose vector is not shown."""
    for at, query in enumerate(look(compared, 5, 4)):
        q, queue = compared.q[at], compared.run.queue
        assert {example["kind"] for example in query["synthetic"]} == {row.kind for row in compared.recipe}
        for example in query["synthetic"]:
            vectors = {"query": q, "sign": q.sign()}
            parts = [
                (p["weight"], queue[p["row"]] if p["of"] == "row" else vectors.get(p["of"])) for p in example["parts"]
            ]
            if example["kind"] == "noise":
                assert [p["of"] for p in example["parts"]] == ["row", "noise"]
                continue
            mixture = F.normalize(sum(weight * vector for weight, vector in parts), dim=0)
            assert math.isclose(float(mixture @ q), example["similarity"], abs_tol=1e-6)
            rows = [p for p in example["parts"] if p["of"] == "row"]
            assert all(math.isclose(float(queue[p["row"]] @ q), p["similarity"], abs_tol=1e-6) for p in rows)


def test_shares_of_the_softmax_are_those_of_the_loss(compared):
    run, found = compared.run, measure(compared)
    head = contrastive_loss(
        compared.q, compared.k, run.queue, temperature=run.T, n_hard=8, draws=compared.draws(), ids=compared.ids,
        queue_ids=run.ids, impl="reference",
    )  # fmt: skip
    synthetic = sum(row["mass"] for row in found["kinds"].values())
    assert math.isclose(synthetic, float(head.synthetic_mass), rel_tol=rounding(200))
    assert math.isclose(sum(found["mass"].values()) + synthetic, 1, rel_tol=1e-9)
    assert found["top1"] == float((head.rank < 1).double().mean())


def test_false_negatives_are_counted_as_loops_count_them(compared, source):
    run, found = compared.run, measure(compared)
    labels, K = source.labels, len(run.queue)
    ranked = []  # of each query: whether each row is of its class, the hardest first, without those of its own image
    for index, q in zip(compared.ids.tolist(), compared.q, strict=True):
        others = [row for row in range(K) if int(run.ids[row]) != index]
        others.sort(key=lambda row, q=q: -float(run.queue[row] @ q))
        ranked.append([labels[int(run.ids[row])] == labels[index] for row in others])
    assert math.isclose(found["base_rate"], sum(map(sum, ranked)) / sum(map(len, ranked)))
    assert [row["hard"] for row in found["by_hard"]] == [8, 16, 20]
    for row in found["by_hard"]:
        first = [flags[: row["hard"]] for flags in ranked]
        assert math.isclose(row["false"], sum(map(sum, first)) / sum(map(len, first)))
    assert [(row["first"], row["last"]) for row in found["by_rank"]] == [
        (1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8), (9, 12), (13, 16), (17, 20),
    ]  # fmt: skip
    for row in found["by_rank"]:
        there = [flags[row["first"] - 1 : row["last"]] for flags in ranked]
        assert math.isclose(row["false"], sum(map(sum, there)) / sum(map(len, there)))
    assert look(compared, 3, 4)[2]["false_hard"] == sum(ranked[2][:8])


def test_rows_without_an_image_are_counted_and_not_shown(compared):
    """Ten of twenty, among which are the hardest of the first query."""
    run = compared.run
    hardest = (run.queue @ compared.q[0]).topk(10).indices
    ids = run.ids.clone()
    ids[hardest] = EMPTY
    query = look(dataclasses.replace(compared, run=dataclasses.replace(run, ids=ids)), 1, 12)[0]
    assert {row["row"] for row in query["hardest"]}.isdisjoint(hardest.tolist())
    assert query["hardest"][0]["rank"] == 11
    assert query["no_image_hard"] == 8 and query["known_hard"] == 0


def test_without_labels_nothing_is_false(compared):
    found = measure(dataclasses.replace(compared, classes=None))
    assert found["base_rate"] is None and {row["false"] for row in found["by_hard"]} == {None}
    assert "cannot be counted" in mined.sentence(found, False)
    assert {row["false"] for row in found["kinds"].values()} == {None}


def test_hardest_rows_without_a_known_class(compared):
    found = measure(compared)
    for row in found["by_hard"]:
        row["false"] = None
    assert "cannot be counted" in mined.sentence(found, False)
    assert "Of none of the" in curves.false_words(found)


def test_classes_of_supcon_are_positives(compared):
    """With labels beside its queue, rows of the query's class are left out, and their softmax is a positive's."""
    run = compared.run
    tensors = {**run.file.tensors, "queue_labels": run.ids}
    labelled = dataclasses.replace(run, file=run.file._replace(tensors=tensors))
    supervised = dataclasses.replace(compared, run=labelled, hard=len(run.queue))
    found, query = measure(supervised), look(supervised, 1, 12)[0]
    assert query["left_out"] > 0
    assert (query["false_hard"], query["known_hard"]) == (0, len(run.queue) - query["left_out"])
    assert "are positives" in mined.sentence(found, True)
    assert found["base_rate"] == 0 and all(row["false"] == 0 for row in found["by_hard"])
    assert found["mass"]["same"] > 0


def test_batchnorm_never_sees_one_image(run, source):
    views = Sample(run.views(source)[0], run.epoch, range(3))
    device = torch.device("cpu")
    assert run.seen_together == 8
    two = dataclasses.replace(run, recipe={**run.recipe, "--batch-size": 2, "--bn-splits": 1})
    assert two.encode(views.queries, views.keys, device)[0].isfinite().all()
    with pytest.raises(moco.UserError, match="BatchNorm needs two images"):
        run.encode(views.queries[:1], views.keys[:1], device)


def test_keys_are_shuffled_where_a_batch_has_parts(run, source):
    views = Sample(run.views(source)[0], run.epoch, range(len(source)))

    def keys(**flags: object) -> torch.Tensor:
        named = {f"--{name.replace('_', '-')}": value for name, value in flags.items()}
        changed = dataclasses.replace(run, recipe={**run.recipe, **named})
        return changed.encode(views.queries, views.keys, torch.device("cpu"))[1]

    assert torch.equal(keys(shuffle_bn=True, bn_splits=1), keys(shuffle_bn=False, bn_splits=1))
    assert not torch.allclose(keys(shuffle_bn=True, bn_splits=2), keys(shuffle_bn=False, bn_splits=2), atol=1e-3)


def test_the_picture_has_the_colours_of_the_page():
    with open(f"{ASSETS}/charts.css", encoding="utf-8") as file:
        assert tuple(re.findall(r"--s\d: (#\w{6})", file.read())[: charts.SERIES]) == picture.COLOURS


def test_another_method_and_another_h(run):
    name, recipe, hard = run.negatives(None, None)
    assert (name, hard) == ("synco", 8) and [row.count for row in recipe] == [4, 4, 4, 2, 2, 2]
    name, recipe, hard = run.negatives("mochi", 5)
    assert (name, hard) == ("mochi", 5) and {row.kind: row.count for row in recipe} == {
        "mixup": 512,
        "interpolation": 256,
    }
    plain = dataclasses.replace(
        run, recipe={name: x for name, x in run.recipe.items() if name not in ("--n1", "--n-hard")}
    )
    assert plain.negatives(None, None) == ("", (), 20)  # SynCo's 1,024, of which the queue has 20
    with pytest.raises(moco.UserError, match="--n-hard 21 is more than the queue's 20 rows"):
        run.negatives(None, 21)


def test_kinds_that_are_not_in_use(run):
    later = dataclasses.replace(run, recipe={**run.recipe, "--type-starts": ["mixup=9", "noise=9steps"]})
    used = {row.kind: later.in_use(row) for row in later.negatives(None, None)[1]}
    assert [kind for kind, there in used.items() if not there] == ["mixup"]  # of 9 steps 9 are done
    stopped = dataclasses.replace(run, recipe={**run.recipe, "--hard-stop-epoch": 3})
    assert not any(stopped.in_use(row) for row in run.negatives(None, None)[1])


# --------------------------------------------------------------------------------------------- the command


def test_the_command_over_checkpoints(folder, hard_folder, tmp_path, capsys):
    name = "class1/3.png"
    code = command(folder, hard_folder, "--out", tmp_path, "--over-checkpoints", "--sample", "16", "--image", name)
    assert code == 0
    found = json.loads((tmp_path / "negatives.json").read_text())
    assert [row["epoch"] for row in found["checkpoints"]] == [1, 2, 3]
    assert found["queries"] == 16 and found["checkpoint"].endswith("checkpoint_0002.pth.tar")
    (query,) = found["shown"]
    assert query["name"].endswith(name) and query["class"] == "class1"
    assert all(row["same_class"] == (row["class"] == "class1") for row in query["hardest"])
    assert "of the query's class" in capsys.readouterr().out
    assert (tmp_path / "negatives.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_in_a_browser(folder, hard_folder, tmp_path, browse):
    """A class's name stays text, false negatives are framed, and an image is enlarged under the pointer."""
    evil = "<img src=x onerror=alert(1)>&amp;\N{CJK UNIFIED IDEOGRAPH-732B}\N{OLD PERSIAN SIGN A}"
    images = tmp_path / "images"
    shutil.copytree(hard_folder, images)
    for split in ("train", "val"):
        (images / split / "class0").rename(images / split / evil)
    command(folder, images, "--out", tmp_path, "--other-images", "--sample", "16", "--queries", "3")
    found = json.loads((tmp_path / "negatives.json").read_text())
    page = browse(tmp_path / "negatives.html", dark=True)
    assert page.locator("section").count() == 3
    assert page.locator("section .row figure.false").count() == sum(
        row["same_class"] for query in found["shown"] for row in query["hardest"]
    )
    assert [head.endswith(f", class {evil}") for head in page.locator("section > h3").all_inner_texts()] == [
        query["class"] == evil for query in found["shown"]
    ]  # fmt: skip
    assert "was pretrained on other images" in page.locator(".warning").inner_text()
    assert page.locator(".chart svg path.line").count() >= 2 + 2 * len(found["kinds"])
    page.locator("section .row figure").nth(3).hover()
    assert page.locator("#enlarged").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_input_that_cannot_be_used_is_one_sentence(folder, hard_folder, image_folder, pretrained, tmp_path, capsys):
    def refused(*words: object) -> str:
        assert command(*words, "--out", tmp_path / "out") == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    old = load(folder)
    old["state_dict"].pop("module.queue_ids")
    old.pop("run")
    torch.save({name: old[name] for name in ("epoch", "arch", "state_dict")}, tmp_path / "upstream.pth.tar")
    one = folder / "checkpoint_0002.pth.tar"
    for name, odd in {"queue": torch.ones(3), "queue_ids": torch.ones(3), "queue_ptr": torch.arange(2)}.items():
        damaged = load(folder)
        damaged["state_dict"][f"module.{name}"] = odd
        torch.save(damaged, tmp_path / "damaged.pth.tar")
        assert "its queue is not rows of numbers" in refused(tmp_path / "damaged.pth.tar", hard_folder)
    for name, odd in {"--moco-t": 0.0, "--n-hard": "all", "--n1": -1, "--type-starts": 3, "--sigma": 1e300}.items():
        damaged = load(folder)
        damaged["run"]["pretraining"]["recipe"][name] = odd
        torch.save(damaged, tmp_path / "damaged.pth.tar")
        assert f"is damaged: its entry recipe.{name} is " in refused(tmp_path / "damaged.pth.tar", hard_folder)
    nameless = {**load(folder), "arch": ""}
    torch.save(nameless, tmp_path / "nameless.pth.tar")
    assert "does not name its architecture" in refused(tmp_path / "nameless.pth.tar", hard_folder)
    assert "holds no queue" in refused(pretrained, hard_folder)
    assert "does not say which image each row is of" in refused(tmp_path / "upstream.pth.tar", hard_folder)
    assert "was pretrained on other images" in refused(one, image_folder)
    assert "--image 3.png means 3 images" in refused(one, hard_folder, "--image", "3.png")
    assert "is no image of the run" in refused(one, hard_folder, "--image", "no.png")
    assert "give its folder or one of its files" in refused(one, one, hard_folder, "--over-checkpoints")
    with pytest.raises(SystemExit, match="2"):
        command(one)
