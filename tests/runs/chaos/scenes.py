"""Which program reads which files, and what it makes of them when nothing is wrong."""

from __future__ import annotations

import json
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from conftest import SYNCO, TINY, differences, hard_images, load
from PIL import Image

from moco import cli, owner, processes, run_folder
from tests.runs.chaos.attempts import Ended, attempt

SMALL = ["-a", "test_resnet", "--size", "16", "-b", "8", "-j", "0", "--seed", "3", "-p", "1"]
PRETRAIN = ["main_pretrain", *TINY, *SYNCO, "--epochs", "3", "--save-every", "1", "--keep", "0", "--knn-every", "1"]
LINCLS = ["main_lincls", *SMALL, "--lr", "0.3", "0.1", "--epochs", "2"]
SEMISUP = ["main_semisup", *SMALL, "--lr-classifier", "0.1", "--epochs", "2", "--train-percent", "50"]
TIMES = ("images_per_second", "wait_share", "eta_seconds", "time", "step_ms", "ended", "seconds")
FAKE = """import argparse, json, os
p = argparse.ArgumentParser()
for name in ("lr", "save-dir", "resume", "seed"):
    p.add_argument("--" + name)
a = p.parse_args()
open(os.path.join(a.save_dir, "result.json"), "w").write(json.dumps({"val": float(a.lr), "test": 2 * float(a.lr)}))
"""
SPEC = {"grid": {"lr": [1, 3]}, "seeds": [0], "select": {"metric": "val"}, "report": {"metrics": ["test"]},
        "run": {"slots": 2}}  # fmt: skip

EXACT = (True, True)  # believed only where it is what it was: after damage to bytes, after one to the structure
BYTES = (True, False)
ANY = (False, False)  # nothing in the file tells a changed value from a right one: any result, and good manners
File = tuple[str, tuple[bool, bool]]  # how it is written (see mutations.py), and the two of above
Value = Callable[[Path, Ended], Any]


@dataclass
class Scene:
    """A command over a copy of ``template``; ``{}`` in its words is the copy's folder.

    files: what it reads, by path in the copy. value: what it made; equal for two runs that nothing disturbs.
    """

    name: str
    template: str
    words: list[str]
    files: dict[str, File]
    value: Value
    codes: tuple[int, ...] = (0, 2)
    weight: float = 1.0  # how often it is drawn
    prepare: Callable[[], None] | None = None
    made: dict[Path, tuple[Any, Ended]] = field(default_factory=dict)  # undisturbed, by folder

    def set_up(self, base: Path, here: Path) -> None:
        """A fresh copy of the template."""
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(base / self.template, here)

    def run(self, here: Path, prepare: Callable[[], None] | None = None) -> Ended:
        """The command as a process."""
        words = [word.replace("{}", str(here)) for word in self.words]
        return attempt(words, here.with_suffix(".txt"), prepare or self.prepare)

    def undisturbed(self, base: Path, here: Path) -> tuple[Any, Ended]:
        """What it makes of the whole files."""
        if here not in self.made:
            self.set_up(base, here)
            ended = self.run(here)
            assert ended.code == 0, f"{self.name} fails undisturbed: {ended.text}"
            self.made[here] = self.value(here, ended), ended
        return self.made[here]


# ----------------------------------------------------------------------------------------------- what was made


def records(path: Path) -> list[dict]:
    """A log without times."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def run_value(here: Path, ended: Ended) -> Any:
    """A run's last state and what its results say."""
    states = {name: load(here / name) for name in ("checkpoint.pth.tar", "checkpoint_semisup.pth.tar")
              if (here / name).exists()}  # fmt: skip
    newest = run_folder.newest(str(here))
    return {**states, **({"newest": load(newest)} if newest else {})}


def log_value(here: Path, ended: Ended) -> Any:
    """The same and its log."""
    logs = [path for path in sorted(here.glob("*.jsonl")) if not path.stem.endswith("_events")]
    return {**run_value(here, ended), **{path.name: records(path) for path in logs}}


def of_file(name: str) -> Value:
    """What a file holds: a checkpoint's entries, else its bytes."""

    def value(here: Path, ended: Ended) -> Any:
        path = here / name
        return load(path) if name.endswith((".tar", ".pth")) else path.read_bytes()

    return value


def printed(here: Path, ended: Ended) -> Any:
    """What a program says."""
    return ended.text


def nothing(here: Path, ended: Ended) -> Any:
    """For programs whose files cannot tell."""
    return None


def differ(one: Any, other: Any) -> str:
    """Where two values differ, in a few words; empty where they are equal."""
    found = differences(one, other)
    return f"{len(found)} entries differ, first {min(found) or 'the whole'}" if found else ""


# --------------------------------------------------------------------------------------------------- templates


class FakeWandb(types.ModuleType):
    """Weights & Biases without its service."""

    def init(self, id: str | None = None, **more: Any) -> Any:
        assert id is None or (id.isprintable() and 0 < len(id) < 129 and not set(id) & set("/\\#?%:")), repr(id)
        page = types.SimpleNamespace(id=id or "page1", log=lambda *a, **k: None, finish=lambda: None)
        return page


def fake_wandb() -> None:
    """Put it where --wandb finds it."""
    import importlib.machinery

    module = FakeWandb("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    sys.modules["wandb"] = module


def build(base: Path, short: bool) -> None:
    """All templates; ``short``: without the ones that take seconds."""
    base.mkdir(parents=True)
    images = hard_images(base / "images", 8, 5, "{label}_{i}.png")
    (base / "fake.py").write_text(FAKE)

    def made(*words: object, code: int = 0, prepare: Callable[[], None] | None = None) -> None:
        ended = attempt([str(word) for word in words], base / "output.txt", prepare)
        assert ended.code == code, f"{words} fails undisturbed with {ended.code}: {ended.text}"

    whole, part = base / "whole", base / "pretrain"
    made(*PRETRAIN, "--save-dir", whole, images)
    shutil.copytree(whole, part)
    (part / "checkpoint_0002.pth.tar").unlink()
    (part / "latest").write_text("checkpoint_0001.pth.tar\n")
    pretrained = whole / "checkpoint_0002.pth.tar"
    for name, main in (("lincls", LINCLS), ("semisup", SEMISUP)):
        for _ in range(2):
            stop = ["--max-minutes", "0", "--resume", "auto", "--save-dir", base / name]
            made(*main, "--pretrained", pretrained, *stop, images, code=75)
    me = processes.this_process()  # but for its number: a process that is gone
    for name, kind in (("pretrain", "owner"), ("lincls", "owner_result"), ("semisup", "owner_result")):
        left = asdict(owner.Owner("here", me.machine, 2**31 - 1, me.started, "once"))
        (base / name / f"{kind}.json").write_text(json.dumps(left) + "\n")
    weights = base / "weights"
    weights.mkdir()
    shutil.copy(pretrained, weights / "pretrained.pth.tar")
    made("moco.average", whole, "--last", "2", "--no-refresh", "--out", weights / "averaged.pth.tar")
    for to, name in (("safetensors", "exported.safetensors"), ("timm", "exported.pth")):
        made("moco.export", pretrained, "--to", to, "--out", weights / name)
    shutil.copy(base / "lincls" / "checkpoint.pth.tar", weights / "probe.pth.tar")
    shutil.copy(base / "semisup" / "checkpoint_semisup.pth.tar", weights / "tuned.pth.tar")
    made("moco.data", "pack", images, base / "shards")
    shutil.copytree(base / "shards", base / "scanned")
    for path in (base / "scanned").glob("*/index.npz"):
        path.unlink()
    _lists(base, images)
    made("main_pretrain", *TINY, "--epochs", "1", "--cache", base / "cache", "--save-dir", base / "x", images)
    _sweep(base, made)
    wandb = ["--wandb", "p", "--save-dir", base / "wandb", images]
    made("main_pretrain", *TINY, "--steps", "2", *wandb, prepare=fake_wandb)
    _reported(base, images, made)
    if not short:
        (base / "resnet").mkdir()
        made("tests.runs.chaos.resnet", base / "resnet" / "resnet50.pth.tar")
    (base / "empty").mkdir()


def _lists(base: Path, images: Path) -> None:
    paths = sorted((images / "train").rglob("*.png"))
    lists, pictures = base / "lists", base / "pictures"
    lists.mkdir()
    pictures.mkdir()
    (lists / "list.txt").write_text("".join(f"{p}\t{p.parent.name}\n" for p in paths))
    lines = (json.dumps({"image_path": str(p), "label": int(p.parent.name[-1])}) + "\n" for p in paths)
    (lists / "list.jsonl").write_text("".join(lines))
    (lists / "names.txt").write_text("".join(f"{p.name}\n" for p in paths[::2]))
    (lists / "config.yml").write_text("epochs: 1\nlr: 0.03\nsize: 16\ncos: true\nbatch-size: 8\nmean: [0.5, 0.4, 0.3]\n"
                                      "std: [0.2, 0.2, 0.2]\n")  # fmt: skip
    for number, path in enumerate(paths[:16]):
        with Image.open(path) as image:
            image.resize((48, 40)).save(pictures / f"{number}.{'png' if number % 2 else 'jpg'}")


def _sweep(base: Path, made: Callable[..., None]) -> None:
    import yaml

    (base / "sweep").mkdir()
    (base / "sweep" / "spec.yml").write_text(yaml.safe_dump({"main": str(base / "fake.py"), **SPEC}, sort_keys=False))
    made("moco.sweep", base / "sweep" / "spec.yml", "--out", base / "sweep" / "out")


def _reported(base: Path, images: Path, made: Callable[..., None]) -> None:
    """All that a report reads: runs of three kinds, results of every kind, pictures, a sweep, and detections."""
    top = base / "reported"
    shutil.copytree(base / "whole", top, ignore=shutil.ignore_patterns("*.tar", "events.out*"))
    probe, tuned = (base / name for name in ("lincls", "semisup"))
    for name, folder in (("probe", probe), ("tuned", tuned)):
        shutil.copytree(folder, top / name, ignore=shutil.ignore_patterns("*.tar*", "events.out*", "owner*"))
    result = {"mode": "lincls", "pretrained": "x.pth.tar", "acc1": 50.0, "acc5": 90.0, "lr": 0.3, "epochs": 2,
              "features": "last", "selected_on": "test", "train_images": 24, "val_images": 15, "unreadable": 0,
              "per_lr": [{"lr": 0.3, "acc1": 50.0, "val_loss": 1.0, "selected": True}]}  # fmt: skip
    shots = {"acc_1shot": 30.0, "ci95_1shot": 1.0}
    settings = {"train_percent": 50, "weights": "imagenet", "lr_backbone": 0.1, "lr_classifier": 0.1}
    aps = {name: {"mean": 40.0, "std": 0.1, "trials": [40.0]} for name in ("AP", "AP50", "AP75")}
    written = {
        "probe/result.json": result,
        "tuned/result.json": {**result, "mode": "semisup", "settings": settings, "seed": 3, "best_epoch": 1, **shots},
        "knn.json": {"mode": "knn", "k": 5, "T": 0.1, "knn": 40.0, "knn_5": 40.0, "val_images": 15},
        "few_shot.json": {"mode": "few_shot", "way": 2, "episodes": 9, "queries": 3, "val_images": 15, **shots},
        "lr_find.json": {"mode": "lr_find", "suggestion": 0.1, "steps": 9, "diverged_at": 3.0, "edge": ""},
        "retrieval.json": {"features": {"map": 30.0, "ami": 2.0}, "head": {"map": 31.0}, "images": 24},
        "voc/summary.json": {"config": "voc", "opts": [], "checkpoint": "x.pth", "published": {"a": [3, 1, 2, 3]},
                             **aps},
        "one/results.json": {"bbox": {"AP": 40.0, "AP50": 60.0, "AP75": 41.0}},
        "two/metrics.json": {"iteration": 9, "bbox/AP": 4.0, "bbox/AP50": 6.0, "bbox/AP75": 4.0},
    }  # fmt: skip
    for name, value in written.items():
        (top / name).parent.mkdir(exist_ok=True)
        (top / name).write_text(json.dumps(value) + "\n")
    for name in ("one", "two"):
        (top / name / "config.yaml").write_text("MODEL:\n  WEIGHTS: out.pkl\n")
    shutil.copytree(base / "sweep" / "out", top / "sweep")
    for picture in ("embedding.png", "neighbours.png"):
        shutil.copy(next(images.rglob("*.png")), top / picture)


# ------------------------------------------------------------------------------------------------------ readers


# of the readers, those whose programs and files the others have too: only in the long form
LONG = """
describe averaged.pth.tar
describe probe.pth.tar
describe exported.pth
average --best
retrieval
main_lincls --pretrained averaged.pth.tar
main_lincls --pretrained exported.pth
pretrain list.jsonl
main_semisup --pretrained pretrained.pth.tar
main_semisup --pretrained averaged.pth.tar
embed
main_semisup --pretrained exported.pth
main_semisup --pretrained exported.safetensors
export timm
""".strip().splitlines()


def readers(base: Path, short: bool) -> list[Scene]:
    """Every program that reads files, with the files that it reads."""
    return [scene for scene in _all_readers(base) if not (short and scene.name in LONG)]


def _all_readers(base: Path) -> list[Scene]:
    images, tiny = str(base / "images"), ["main_pretrain", *TINY, "--epochs", "1", "--save-dir", "{}/run"]
    logs: dict[str, File] = {"log.jsonl": ("jsonl", EXACT), "log_settings.json": ("json", EXACT)}
    held: dict[str, File] = {"owner_result.json": ("json", EXACT)}
    ends = {"checkpoint_0001.pth.tar": ("checkpoint", EXACT), "checkpoint_0000.pth.tar": ("checkpoint", EXACT)}
    auto = ["--resume", "auto", "--save-dir", "{}", images]
    found = [
        Scene("pretrain --resume auto", "pretrain", [*PRETRAIN, *auto],
              {**ends, "latest": ("text", EXACT), "owner.json": ("json", EXACT), **logs}, run_value,
              weight=6),
        Scene("pretrain --resume FILE", "pretrain",
              [*PRETRAIN, "--resume", "{}/checkpoint_0001.pth.tar", "--save-dir", "{}", images],
              {"checkpoint_0001.pth.tar": ("checkpoint", EXACT)}, log_value, weight=4),
        Scene("lincls --resume auto", "lincls", [*LINCLS, "--pretrained", f"{base}/weights/pretrained.pth.tar", *auto],
              {"checkpoint.pth.tar": ("checkpoint", EXACT), "lincls.jsonl": ("jsonl", EXACT), **held}, run_value,
              weight=3),
        Scene("semisup --resume auto", "semisup",
              [*SEMISUP, "--pretrained", f"{base}/weights/pretrained.pth.tar", *auto],
              {"checkpoint_semisup.pth.tar": ("checkpoint", EXACT), "semisup.jsonl": ("jsonl", EXACT), **held},
              run_value, weight=3),
    ]  # fmt: skip
    if (base / "resnet").exists():
        words = ["detection/convert-pretrain-to-detectron2.py", "{}/resnet50.pth.tar", "{}/out.pkl"]
        files_ = {"resnet50.pth.tar": ("checkpoint", EXACT)}
        found.append(Scene("convert", "resnet", words, files_, of_file("out.pkl"), weight=0.3))
    found += [*_of_weights(images), *_of_data(images, tiny), *_of_others(base, images)]
    return [*found, *_of_looking(base, images)]


def _of_looking(base: Path, images: str) -> list[Scene]:
    """The programs that show what there is."""
    weights = f"{base}/weights/pretrained.pth.tar"
    kept: File = ("checkpoint", EXACT)
    files = {str(path.relative_to(base / "reported")) for path in (base / "reported").rglob("*") if path.is_file()}
    forms = {".json": "json", ".jsonl": "jsonl", ".csv": "text", ".png": "png", ".yaml": "yaml"}
    read: dict[str, File] = {}
    for name in sorted(files):
        if form := forms.get(Path(name).suffix):
            read[name] = (f"found {form}", ANY)
    pictures = {f"{n}.{'png' if n % 2 else 'jpg'}": ("png" if n % 2 else "jpg", ANY) for n in range(16)}
    small = ["-b", "8", "-j", "0", "--k", "3", "--out", "{}/out"]
    mined = ["--sample", "16", "--queries", "2", "--out", "{}/out"]
    return [
        Scene("report", "reported", ["moco.report", "{}", "--out", "{}/page.html"], read, nothing, weight=6),
        Scene("neighbours CKPT", "weights", ["moco.neighbours", "{}/pretrained.pth.tar", images, *small],
              {"pretrained.pth.tar": kept}, of_file("out/neighbours.png")),
        Scene("neighbours DIR", "pictures", ["moco.neighbours", weights, "{}", *small], pictures, nothing, weight=2),
        Scene("neighbours IMAGE", "pictures", ["moco.neighbours", weights, images, "{}/0.jpg", "{}/1.png", *small],
              {name: pictures[name] for name in ("0.jpg", "1.png")}, nothing),
        Scene("negatives", "pretrain", ["moco.negatives", "{}/checkpoint_0001.pth.tar", images, *mined],
              {"checkpoint_0001.pth.tar": kept}, of_file("out/negatives.png"), weight=2),
        Scene("negatives RUN", "pretrain", ["moco.negatives", "{}", images, "--over-checkpoints", *mined],
              {"checkpoint_0000.pth.tar": kept, "checkpoint_0001.pth.tar": kept, "latest": ("text", ANY)},
              of_file("out/negatives.png"), weight=2),
    ]  # fmt: skip


def _of_weights(images: str) -> list[Scene]:
    kept: File = ("checkpoint", EXACT)
    one = {"pretrained.pth.tar": kept}
    weights = {**one, "averaged.pth.tar": kept, "probe.pth.tar": kept, "tuned.pth.tar": kept, "exported.pth": kept,
               "exported.safetensors": ("safetensors", ANY)}  # fmt: skip
    described = [
        Scene(
            f"describe {name}",
            "weights",
            ["moco.describe", f"{{}}/{name}"],
            {name: (form, (exact[0], False))},
            printed,
            (0, 1, 2),
        )
        for name, (form, exact) in weights.items()
    ]
    read = ["{}/pretrained.pth.tar", images, "--out", "{}/out", "-b", "8", "-j", "0"]
    evaluate = [
        Scene(f"{main[0]} --pretrained {name}", "weights",
              [*main, "--pretrained", f"{{}}/{name}", "--save-dir", "{}/run", images], {name: file},
              lambda here, ended: run_value(here / "run", ended))
        for main in (LINCLS, SEMISUP) for name, file in weights.items() if "probe" not in name and "tuned" not in name
    ]  # fmt: skip
    return [
        *described, *evaluate,
        Scene("average", "pretrain", ["moco.average", "{}", "--last", "2", "--no-refresh", "--out", "{}/out.pth.tar"],
              {"checkpoint_0001.pth.tar": kept, "checkpoint_0000.pth.tar": kept}, of_file("out.pth.tar"), weight=2),
        Scene("average --best", "pretrain",
              ["moco.average", "{}", "--best", "2", "--no-refresh", "--out", "{}/out.pth.tar"],
              {"log.jsonl": ("jsonl", EXACT)}, of_file("out.pth.tar")),
        *(Scene(f"export {to}", "weights", ["moco.export", "{}/pretrained.pth.tar", "--to", to, "--out", f"{{}}/{out}"],
                one, of_file(out), weight=2) for to, out in (("timm", "out.pth"), ("safetensors", "out.safetensors"))),
        Scene("embed", "weights", ["moco.embed", *read, "--picture", "none"], one, of_file("out/features.npz")),
        Scene("retrieval", "weights", ["moco.retrieval", *read], one, of_file("out/retrieval.json")),
    ]  # fmt: skip


def _of_data(images: str, tiny: list[str]) -> list[Scene]:
    def inside(here: Path, ended: Ended) -> Any:
        return run_value(here / "run", ended)

    split = ("train", "val")
    packed = {f"{name}/index.npz": ("npz", BYTES) for name in split}
    shard = {f"{name}/shard-000000.tar": ("tar", ANY) for name in split}
    names = {f"{name}/classes.txt": ("text", ANY) for name in split}
    lists = [
        Scene(f"pretrain {name}", "lists", [*tiny, f"{{}}/{name}"], {name: ("lines", ANY)}, nothing)
        for name in ("list.txt", "list.jsonl")
    ]
    pixels = next((Path(images).parent / "cache").glob("*.pixels"), Path("none.pixels")).name
    pictures = {f"{n}.{'png' if n % 2 else 'jpg'}": ("png" if n % 2 else "jpg", ANY) for n in range(16)}
    return [
        Scene("pretrain shards", "shards", [*tiny, "--knn-every", "1", "{}"], {**packed, **shard, **names}, inside,
              weight=2),
        Scene("pretrain shards without index", "scanned", [*tiny, "{}"], {**shard, **names}, nothing, weight=2),
        *lists,
        Scene("pretrain --cache", "cache", [*tiny, "--cache", "{}", images], {pixels: ("pixels", EXACT)}, inside,
              weight=2),
        Scene("pretrain images", "pictures", [*tiny, "--max-bad-images", "3", "{}"], pictures, nothing, weight=4),
        Scene("pack images", "pictures", ["moco.data", "pack", "{}", "{}/out"], pictures, nothing),
        Scene("pack list", "lists", ["moco.data", "pack", "{}/list.txt", "{}/out"], {"list.txt": ("lines", ANY)},
              nothing),
    ]  # fmt: skip


def _of_others(base: Path, images: str) -> list[Scene]:
    weights = f"{base}/weights/pretrained.pth.tar"
    trials = sorted((base / "sweep").glob("out/trials/*"))
    kept: dict[str, File] = {f"{trial.relative_to(base / 'sweep')}/trial.json": ("json", ANY) for trial in trials}
    kept |= {f"{trial.relative_to(base / 'sweep')}/result.json": ("json", ANY) for trial in trials}
    return [
        Scene("sweep", "sweep", ["moco.sweep", "{}/spec.yml", "--out", "{}/out"],
              {"spec.yml": ("yaml", ANY), **kept}, nothing, (0, 1, 2), weight=3),
        Scene("pretrain --config", "lists", ["main_pretrain", *TINY[:2], *TINY[6:], "--save-dir", "{}/run",
                                              "--steps", "2", "--config", "{}/config.yml", images],
              {"config.yml": ("yaml", ANY)}, nothing, weight=2),
        Scene("semisup --train-files", "lists", [*SEMISUP[:-2], "--train-files", "{}/names.txt",
                                                  "--pretrained", weights, "--save-dir", "{}/run", images],
              {"names.txt": ("lines", ANY)}, nothing),
        Scene("pretrain --wandb", "wandb", ["main_pretrain", *TINY, "--steps", "3", "--wandb", "p", "--resume", "auto",
                                             "--save-dir", "{}", images],
              {"log.wandb": ("text", EXACT)}, log_value, prepare=fake_wandb),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ writers


def writers(base: Path) -> list[Scene]:
    """Every program that writes files, over the same templates; what it writes is its value."""
    patience = ["--data-patience", "0.01"] * ("--data-patience" in cli.pretrain_parser().flags())
    from_start = ["--save-dir", "{}/run", "--resume", "auto", *patience, str(base / "images")]
    weights = ["--pretrained", f"{base}/weights/pretrained.pth.tar"]

    def log_of(here: Path, ended: Ended) -> Any:
        return log_value(here / "run", ended)

    shared = ("embed", "retrieval", "export timm", "export safetensors", "average", "pack list", "report",
              "neighbours CKPT", "negatives")  # fmt: skip
    same = [scene for scene in _all_readers(base) if scene.name in shared]
    for scene in same:
        scene.files, scene.weight = {}, min(scene.weight, 2.0)
        scene.value = tree_value if scene.name == "pack list" else scene.value
    return [
        Scene("pretrain", "empty", [*PRETRAIN, *from_start], {}, log_of, weight=6),
        Scene("lincls", "empty", [*LINCLS, *weights, *from_start], {}, log_of, weight=3),
        Scene("semisup", "empty", [*SEMISUP, *weights, *from_start], {}, log_of, weight=3),
        *same,
        Scene("sweep", "empty", ["moco.sweep", f"{base}/sweep/spec.yml", "--out", "{}/out"], {},
              of_file("out/results.md"), (0, 1, 2)),
        Scene("index", "images", ["moco.data", "index", "{}"], {}, tree_value),
        Scene("cache", "empty", ["main_pretrain", *TINY, "--epochs", "1", "--cache", "{}/cache", *from_start], {},
              log_of),
    ]  # fmt: skip


def tree_value(here: Path, ended: Ended) -> Any:
    """All files of a folder."""
    return {str(path.relative_to(here)): path.read_bytes() for path in sorted(here.rglob("*")) if path.is_file()}
