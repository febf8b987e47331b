"""The model card that an export has: what was measured of its encoder, and README.md for people.

Only figures that a run wrote down are named, with their settings: of the checkpoint itself, of the log beside it, and
of result files beside it or one folder below whose ``pretrained`` is this file.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Iterator
from typing import Any

import torch

import moco
from moco import files
from moco.config import typed
from moco.data.registry import DATASETS
from moco.errors import printable
from moco.files import run_of
from moco.weights.layouts import FROM_CARD, File
from moco.weights.origin import length_words, projection_words

RESULTS = ("knn.json", "result.json")


# ---------------------------------------------------------------------------------------------- what was measured


def measured(file: File) -> list[dict[str, Any]]:
    """The accuracies of a file's encoder that are known, in percent: ``measure``, ``top1``, its settings, and ``by``,
    the file that says it."""
    if file.beside == FROM_CARD:
        return list(file.settings.get("measured", []))
    found = [*_by_itself(file), *_by_the_log(file)]
    folder = os.path.dirname(file.path) or "."
    places = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir())
    for place in (folder, *places):
        for name in RESULTS:
            path = os.path.join(place, name)
            result = files.read_json(path)
            if _is_of(file.path, result.get("pretrained"), path):
                found += _by_a_result(result, os.path.relpath(path, folder))
    return found


def _by_itself(file: File) -> Iterator[dict[str, Any]]:
    """A classifier's own accuracy."""
    flags, best = run_of(file.state).get("flags") or {}, file.state.get("best_acc1")
    if not _is_percent(best) or not {"--features", "--weights"} & flags.keys():
        return
    kind = "linear probe" if "--features" in flags else "fine-tuning"
    names = ("--lr", "--lr-backbone", "--lr-classifier", "--epochs", "training images")
    known = {name.lstrip("-").replace("-", "_"): flags[name] for name in names if flags.get(name) not in (None, "")}
    yield {"measure": f"{kind}, the best of its epochs", "top1": best, **known, "by": "the checkpoint"}


def _by_the_log(file: File) -> Iterator[dict[str, Any]]:
    """The k-NN accuracy that a pretraining has logged of the very step of its checkpoint."""
    step, settings = run_of(file.state).get("step"), file.settings if file.beside == "log_settings.json" else {}
    ks, temperature = settings.get("knn_k"), settings.get("knn_t")
    if not step or "best_acc1" in file.state or not isinstance(ks, list) or not ks:
        return
    log = files.records(os.path.join(os.path.dirname(file.path), "log.jsonl"))
    values = [record["knn"] for record in log if record.get("step") == step and _is_percent(record.get("knn"))]
    if values:
        yield {"measure": "k-NN", "top1": values[-1], "k": ks[0], "T": temperature, "by": "log.jsonl"}


def _by_a_result(result: dict[str, Any], name: str) -> Iterator[dict[str, Any]]:
    counts = {key: result[key] for key in ("train_images", "val_images") if isinstance(result.get(key), int)}
    if result.get("mode") == "knn" and _is_percent(result.get("knn")):
        alone = {"leave_one_out": True} if result.get("leave_one_out") else {}
        yield {"measure": "k-NN", "top1": result["knn"], "k": result.get("k"), "T": result.get("T"), **alone, **counts,
               "by": name}  # fmt: skip
    if result.get("mode") == "lincls" and _is_percent(result.get("acc1")):
        keys = ("lr", "epochs", "features", "selected_on")
        known = {key: result[key] for key in keys if isinstance(result.get(key), (int, float, str))}
        yield {"measure": "linear probe", "top1": result["acc1"], **known, **counts, "by": name}


def _is_of(path: str, pretrained: Any, result: str) -> bool:
    """Whether a result that is not older than a checkpoint was measured on it, which was named from some folder."""
    if not isinstance(pretrained, str) or not pretrained or "\0" in pretrained:
        return False
    named, own = os.path.normpath(pretrained), os.path.realpath(path)
    same = own == os.path.realpath(named) if os.path.isabs(named) else f"/{own}".endswith(f"/{named}")
    return same and os.path.getmtime(result) >= os.path.getmtime(path)


def _is_percent(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= 100


# ------------------------------------------------------------------------------------------------- for a program


def training_command(card: dict[str, Any], spelled: Any) -> str:
    """The command that pretrained the encoder, its images as DIR where they are no known data set; empty where the
    file does not say it.

    spelled: :func:`moco.cli.flag_classes.command_of`.
    """
    made = card.get("pretraining")
    if not made:
        return ""
    images = {f"--{name}": card[name] for name in ("arch", "stem", "size", "channels", "mean", "std")}
    images |= {"--levels": levels} if len(levels := card.get("levels", ())) == 2 else {}
    words = spelled({"--method": made["method"], **images, **made["recipe"]})
    data = (made.get("data") or {}).get("name")
    words += ["--dataset", data] if data in DATASETS else ["DIR"]
    return one_line(shlex.join(["moco", "pretrain", *words]))


def one_line(text: str) -> str:
    """Text from a file, without what ends a line or is obeyed by a terminal."""
    return printable(" ".join(text.split()))


# -------------------------------------------------------------------------------------------------- for people


def readme(card: dict[str, Any], name: str, config: dict[str, Any]) -> str:
    """README.md of a folder for timm, see :mod:`moco.weights.hub`.

    Args:
        card: of :func:`moco.weights.export.make_card`, with timm's architecture.
        name: of the folder.
        config: the entries of config.json.
    """
    made = card.get("pretraining") or {}
    kept, method = config["num_classes"], made.get("method", "a method that its checkpoint does not name")
    tags = ["timm", "self-supervised", "contrastive-learning", *([made["method"].replace("_", "-")] if made else [])]
    head = ["---", "library_name: timm", f"pipeline_tag: image-{'classification' if kept else 'feature-extraction'}"]
    head += ["tags:", *(f"- {tag}" for tag in tags), "# license: yours to choose, before the model is published", "---"]
    text = [*head, f"# {_plain(name)}", ""]
    ending = f"with a classifier of {kept} outputs" if kept else "without a head"
    text += [f"{_code(config['architecture'])} {ending}, pretrained by {method}.", ""]
    text += [*_loading(card, name), "", "## What it is", "", *_table(_facts(card, config)), ""]
    if command := card.get("command"):
        text += ["## Pretraining", "", "```bash", command, "```", ""]
    return "\n".join([*text, "## Measured", "", *_measures(card.get("measured", [])), "", *_versions(made)]) + "\n"


def _loading(card: dict[str, Any], name: str) -> list[str]:
    own, channels, size = one_line(name), card["channels"], card["size"]
    mode = "L" if channels == 1 else "RGB"
    use = [
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
        f'features = model(transform(Image.open("image.jpg").convert("{mode}")).unsqueeze(0))',
    ]
    if channels not in (1, 3):  # PIL has no such images
        use = [f"images = torch.zeros(1, {channels}, {size}, {size})  # (levels / 255 - mean) / std, see below"]
        use.append("features = model(images)")
    place, config, weights = (
        json.dumps(text) for text in (f"local-dir:{own}", f"{own}/config.json", f"{own}/model.safetensors")
    )
    return [
        "## Load it", "", "Run in the folder that this one lies in, with timm 1.0.26 or later:", "",
        "```python", "import timm", "from PIL import Image" if channels in (1, 3) else "import torch", "",
        f'model = timm.create_model({place}, pretrained=True).eval()',
        *use, "```", "",
        "With an earlier timm:", "",
        "```python", "import json", "", f"with open({config}) as file:",
        "    config = json.load(file)",
        f'overlay = {{**config["pretrained_cfg"], "file": {weights}}}',
        'options = {"pretrained_cfg_overlay": overlay, **config["model_args"]}',
        'model = timm.create_model(config["architecture"], pretrained=True, **options).eval()', "```",
    ]  # fmt: skip


def _facts(card: dict[str, Any], config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    made = card.get("pretraining") or {}
    yield "architecture", _code(config["architecture"])
    yield "input", f"{card['channels']} x {card['size']} x {card['size']} pixels"
    if levels := card.get("levels"):
        which = f" of {levels[2]} images" * (len(levels) > 2)
        yield "values that become black and white", f"{typed(levels[:2])}{which}"
    yield "mean, standard deviation", f"{typed(card['mean'])}; {typed(card['std'])}"
    yield "width of the features", str(card["width"])
    if made:
        recipe = " ".join(f"{name} {typed(value)}" for name, value in made["recipe"].items() if value is not False)
        yield "method", made["method"]
        yield "recipe", _code(recipe)
        yield "projection head in pretraining", projection_words(made.get("projection") or {}) or "not recorded"
        data = made.get("data") or {}
        yield "images", f"{data['images']} of {_code(short(data['name']))}" if data else "not recorded"
        yield (
            "trained for",
            f"{length_words(made) or 'not recorded'}" + (f", seed {made['seed']}" if "seed" in made else ""),
        )
    if tuned := made.get("finetuned"):
        yield "then fine-tuned on", f"{_code(short(tuned['name']))}, {tuned['epochs']} epochs"
    yield "checkpoint", _code(str(card["source"]))


def short(name: str) -> str:
    """The last two parts of a path; other names as they are."""
    return "/".join(name.rstrip("/").split("/")[-2:])


def _measures(found: list[dict[str, Any]]) -> list[str]:
    if not found:
        return ["Nothing: no accuracy is written in the checkpoint or beside it."]
    rows = ["| measure | top-1 accuracy, % | settings | written in |", "| --- | ---: | --- | --- |"]
    for row in found:
        rest = {key: value for key, value in row.items() if key not in ("measure", "top1", "by") and value is not None}
        settings = ", ".join(f"{key.replace('_', ' ')} {_plain(typed(value))}" for key, value in rest.items())
        rows.append(f"| {row['measure']} | {row['top1']:.2f} | {settings} | {_code(row['by'])} |")
    return rows


def _versions(made: dict[str, Any]) -> list[str]:
    import timm

    by = f"Pretrained with torch {_plain(made['torch'])}; w" if "torch" in made else "W"
    written = f"ritten by moco {moco.__version__} with torch {torch.__version__} and timm {timm.__version__}."
    return [by + written]


def _table(facts: Iterator[tuple[str, str]]) -> list[str]:
    return ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts)]


def _code(text: str) -> str:
    """Text from a file as code in a table."""
    return "`" + one_line(text).replace("`", "'").replace("|", "\\|") + "`"


def _plain(text: str) -> str:
    """Text from a file in a sentence or a heading: no letter of it is markup."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>#|!&~" else letter for letter in one_line(text))
