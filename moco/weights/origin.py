"""How an encoder was pretrained: method, recipe, projection head, images, length. Every file that holds the encoder
says it, whoever wrote the file.

A pretraining's checkpoint has the entry as ``run["pretraining"]``. Probes, fine-tunings and averages copy it from the
file that they read, where fine-tunings add ``finetuned``; exported backbones have it in their card. Of an older
checkpoint it is made from the flags in the file, else from those in log_settings.json beside it, and the head from the
tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from moco import schema
from moco.config import Flags, typed
from moco.files import run_of
from moco.methods.registry import METHODS
from moco.models.encoder import head_of
from moco.weights.layouts import File
from moco.weights.settings import FROM_CHECKPOINT, Setting

NEGATIVES = "synthetic negatives"  # how flags name the method whose synthetic negatives there are
_LOCAL = "--local-crops --local-crop-size --local-crop-scale"
_SYNTHETIC = "--control --hard-start-epoch --hard-stop-epoch --type-starts"
# The flags that say how an encoder was pretrained, by what they belong to: all runs, a family of models, a method.
FLAGS = {
    "": f"{_LOCAL} --pretrained --aug --decode --moco-dim --moco-t --batch-size --accum --drop-last --epochs --steps "
    "--opt --lr --wd --momentum --opt-betas --clip-grad --exclude-bias-norm --schedule --lr-decay-rate --cos --min-lr "
    "--plateau --warm --warm-epochs --warm-from --warm-steps --rise-epochs --ema --ema-epoch --amp",
    "queue": "--moco-k --moco-m --mlp --base-temperature --symmetric --mask-same-image --bn-splits --shuffle-bn",
    "batch": "--mlp --base-temperature --contrast-mode --views --sync-bn",
    "momentum": "--moco-m --moco-m-cos --moco-mlp-dim --stop-grad-conv1",
    "hcl": "--beta --tau-plus --estimator",
    "mochi": f"--mochi {_SYNTHETIC}",
    "synco": f"--n-hard --n1 --n2 --n3 --n4 --n5 --n6 --sigma --delta --eta --extrapolation {_SYNTHETIC}",
}
# Flags that mean nothing without another one, or beside it.
IDLE = {
    "--warm": "--warm-epochs --warm-from",
    "--local-crops": _LOCAL,
    "no --cos": "--schedule --lr-decay-rate",
    "no --steps": "--epochs",
}


def made_by(flags: Flags, queue: bool) -> dict[str, Any]:
    """``method`` and ``recipe`` of a pretraining: those of its flags that mean something to its method and are given.

    Args:
        queue: whether the run has a queue of keys, which --method supcon leaves open.
    """
    method = str(flags.get("--method", ""))
    if method not in METHODS:
        return {}
    negatives = flags.get(NEGATIVES) if queue else None
    kinds = ["queue" if queue else METHODS[method].family, method, str(negatives), ""]
    names = dict.fromkeys(name for kind in kinds for name in FLAGS.get(kind, "").split())
    idle = {name for flag, others in IDLE.items() for name in others.split() if not _asks(flag, flags)}
    given = {name: flags[name] for name in names if flags.get(name) not in (None, "", []) and name not in idle}
    return {
        "method": method,
        "recipe": {name: value for name, value in given.items() if schema.FLAGS.fits({name: value})},
    }


def without_other_methods(flags: Flags, recipe: Mapping[str, Any]) -> Flags:
    """The flags of a run; of a pretraining not those that belong to a method that it is not, or that rest."""
    if "--method" not in flags:
        return flags
    kept = (set(flags) - {name for names in FLAGS.values() for name in names.split()}) | set(recipe)
    return {name: value for name, value in flags.items() if name in kept}


def _asks(flag: str, flags: Flags) -> bool:
    """Whether a flag is on; of one that begins with ``no``, whether that flag is not."""
    bare = flag.removeprefix("no ")
    return bool(flags.get(bare)) == (bare == flag)


def projection_of(head: dict[str, Tensor]) -> dict[str, Any]:
    """What a projection head is, from its entries by names such as ``0.weight``: ``kind`` (linear or mlp), ``widths``
    from the features' to the output's, and ``batchnorm`` where it has some; empty without a head."""
    layers = [value for name, value in head.items() if name.endswith("weight") and value.ndim > 1]
    if not layers:
        return {}
    widths = [layers[0].shape[1], *(layer.shape[0] for layer in layers)]
    norm = {"batchnorm": True} if any(name.endswith("running_mean") for name in head) else {}
    return {"kind": "mlp" if len(layers) > 1 else "linear", "widths": widths, **norm}


def entry_of(about: dict[str, Any], encoder: nn.Module, epochs: int, steps: int, seed: int, queue: bool) -> dict:
    """The entry ``pretraining`` of a run's checkpoint; empty for a run that does not say its flags.

    Args:
        about: of :func:`moco.train.resume.about_run`.
        encoder: with its projection head.
        epochs, steps: that are done.
    """
    found = made_by(about.get("flags", {}), queue)
    if not found:
        return {}
    head = encoder.get_submodule(head_of(encoder)).state_dict() if hasattr(encoder, "head_name") else {}
    found["projection"] = projection_of(head)  # of an encoder that was built elsewhere nothing is said
    data = {name: about["data"][name] for name in ("name", "images")} if "data" in about else {}
    version = {"torch": about["torch"]["version"]} if "torch" in about else {}
    return {"pretraining": {**found, "data": data, "epochs": epochs, "steps": steps, "seed": seed, **version}}


def pretraining_of(file: File, head: dict[str, Tensor]) -> Setting:
    """How the encoder in a file was pretrained and what says so, as :func:`entry_of` has it; an empty dictionary for
    other projects' files, and for older classifiers of ours, which do not say it.

    Args:
        head: the entries of the file's head.
    """
    run, card = run_of(file.state), file.settings
    for known, origin in ((run, FROM_CHECKPOINT), (card, file.beside)):
        if isinstance(known.get("pretraining"), dict):
            return Setting(known["pretraining"], origin)
    flags, origin = run.get("flags") or {}, FROM_CHECKPOINT
    if "--method" not in flags:  # a classifier's, or an older pretraining's, whose flags lie beside it
        flags, origin = _named_as_flags(card) if file.beside == "log_settings.json" else {}, file.beside
    found = made_by(flags, "queue" in file.tensors)
    if not found:
        return Setting({}, "")
    found["projection"] = projection_of(head)
    place = {"epochs": file.state.get("epoch"), "steps": run.get("step"), "seed": run.get("seed")}
    if isinstance(data := run.get("data"), dict):
        found["data"] = {name: data[name] for name in ("name", "images")}
    return Setting({**found, **{name: value for name, value in place.items() if value is not None}}, origin)


def _named_as_flags(settings: dict[str, Any]) -> Flags:
    """The settings of log_settings.json by the flags that they are from."""
    words = {"rise": "rise-epochs", "weight_decay": "wd"}
    found = {"--" + words.get(name, name).replace("_", "-"): value for name, value in settings.items()}
    found = {name: value for name, value in found.items() if not isinstance(value, dict)}
    if settings.get("negatives") == "mochi":
        found["--mochi"] = [settings.get(name) for name in ("n_hard", "s", "s2")]
    aug = settings.get("aug") or ("v2" if settings.get("aug_plus") else None)
    return {**found, "--aug": aug, NEGATIVES: settings.get("negatives")}


def described(entry: dict[str, Any]) -> str:
    """The entry in words; empty for an empty one."""
    if not entry:
        return ""
    flags = [f"{name} {typed(value)}" for name, value in entry["recipe"].items() if value is not False]
    head = projection_words(entry.get("projection") or {})
    parts = [f"{entry['method']} {' '.join(flags)}".rstrip(), f"projection {head}" if head else ""]
    data = entry.get("data") or {}
    on = f" on {data['images']} images of {data['name']}" if data else ""
    tuned = entry.get("finetuned")
    parts += [length_words(entry) + on, f"seed {entry['seed']}" if "seed" in entry else ""]
    parts += [f"then fine-tuned on {tuned['name']}, {tuned['epochs']} epochs"] if tuned else []
    return " ".join("; ".join(filter(None, parts)).split())


def length_words(entry: dict[str, Any]) -> str:
    """How long a pretraining was; empty where it is not known."""
    known = [(entry[name], name) for name in ("epochs", "steps") if name in entry]
    return ", ".join(f"{count} {name.removesuffix('s') if count == 1 else name}" for count, name in known)


def projection_words(projection: dict[str, Any]) -> str:
    """A head of :func:`projection_of` in words; empty where it is not known."""
    if not projection:
        return ""
    norm = " with BatchNorm" if projection.get("batchnorm") else ""
    return f"{projection['kind']} {'-'.join(map(str, projection['widths']))}{norm}"
