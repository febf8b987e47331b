"""Write a checkpoint's backbone for other tools: python -m moco.export CKPT --to KIND [--out FILE].

    torchvision, timm   a state dict with that library's names, which its network loads strictly, the card beside it
    hub                 a folder that timm.create_model loads, with a model card (moco/weights/hub.py)
    detectron2          the weight file that detection/ reads (ResNet-50 and ResNet-101), the card beside it
    safetensors         the encoder's own names, the card as metadata
    onnx                a graph from normalised images to features, for any batch size
    features            a state dict with the encoder's own names, the card beside it as JSON

The card says how to build and feed the encoder. Before anything is written, the weights go into a network of the
target library and both compute features of the same images; when they differ, nothing is written.

Legend: N images, F feature width.
"""

from __future__ import annotations

import json
import os
import re
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from moco import bars, files, resources
from moco.errors import UserError, tell
from moco.files import run_of
from moco.models.encoder import backbone_keys, build_encoder, features, head_of, torchvision_names
from moco.weights import card as model_card
from moco.weights import detectron2_names, hub
from moco.weights.changes import apply_changes, bare_names, describe_changes
from moco.weights.layouts import CARD, head_entries
from moco.weights.read import Backbone, differing, open_backbone
from moco.weights.settings import settle_from_file

SUFFIXES = {
    "torchvision": ".torchvision.pth",
    "timm": ".timm.pth",
    "hub": ".hub",  # a folder
    "detectron2": ".detectron2.pkl",
    "safetensors": ".safetensors",
    "onnx": ".onnx",
    "features": ".features.pt",
}
_NOTHING_WRITTEN = "nothing was written. Choose --to safetensors, which keeps the encoder as it is."
FEATURE_TOLERANCE = 1e-5  # of features, relative to their largest
ONNX_TOLERANCE = 1e-4  # other kernels add in another order
MOST_IMAGES = 2**31 - 1  # of a batch; torch 2.6 traces no ViT without a bound

# torchvision's ViT by timm's names: a pure renaming (timm's qkv is torchvision's in_proj).
TORCHVISION_VITS = {f"vit_{word[0]}_{p}": f"vit_{word}_patch{p}_224" for word in ("base", "large") for p in (16, 32)}
TORCHVISION_VITS["vit_h_14"] = "vit_huge_patch14_224"
_VIT_NAMES = (
    (r"^class_token$", "cls_token"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.self_attention\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
)


def run_export(args: Namespace) -> None:
    if args.head == "keep" and args.to in ("detectron2", "safetensors", "features"):
        raise UserError(f"--head keep has no meaning for --to {args.to}; leave it out.")
    settled = settle_from_file(args, args.checkpoint, args.dataset)
    source = open_backbone(args.checkpoint, args.arch, args.stem, args.size)
    out = destination(args)
    made = make_card(source, *settled.statistics(source.channels, source.size))
    made |= {"levels": levels} if (levels := getattr(args, "levels", None)) else {}
    if args.head == "keep":
        made |= keep_the_head(source)
    command = model_card.training_command(made, args.spelled)
    made |= {"command": command} if command else {}
    lines = _write(source, args.to, out, made, args.head == "keep")
    tell(f"{source.arch}, {source.stem} stem, {source.size} px: {source.summary}{settled.summary}", *lines)


def destination(args: Namespace) -> str:
    """--out, else beside the checkpoint; never the checkpoint itself."""
    stem = re.sub(r"(\.pth\.tar|\.[A-Za-z]\w*)?/*$", "", args.checkpoint)
    out = args.out or stem + SUFFIXES[args.to]
    folder = os.path.dirname(out) or "."
    if args.to == "hub":
        hub.check_folder(out)
        return out
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder} to write {os.path.basename(out)} to; make it first.")
    if os.path.isdir(out):
        raise UserError(f"--out {out} is a folder; give a file in it.")
    if os.path.exists(out) and os.path.samefile(out, args.checkpoint):
        raise UserError(f"--out {out} is the checkpoint itself; choose another --out.")
    return out


def _write(source: Backbone, to: str, out: str, card: dict[str, Any], keep_head: bool) -> list[str]:
    """Write one backbone for one tool; an older file of that name stays whole until the new one is. Returns lines for
    the console: what was written and how it was made sure of."""
    if to in ("torchvision", "timm"):
        return _to_library(source, to, out, card, keep_head)
    if to == "hub":
        return _to_hub(source, out, card, keep_head)
    if to == "detectron2":
        return _to_detectron2(source, out, card)
    if to == "onnx":
        return _to_onnx(source, out, card, keep_head)
    if to == "features":
        return [_write_with_card(_entries(source.encoder), out, card)]
    from safetensors.torch import save

    with files.replacing(out, "--out") as beside:
        Path(beside).write_bytes(save(_entries(source.encoder), {"format": "pt", "card": json.dumps(card)}))
    return [f"wrote {out}"]


def make_card(source: Backbone, mean: list[float], std: list[float]) -> dict[str, Any]:
    """How to build and feed the encoder, how it was pretrained and what was measured of it: plain values, the same for
    every kind of file. The last two are left out where nothing says them."""
    epoch, found = source.file.state.get("epoch"), model_card.measured(source.file)
    known = {"pretraining": source.pretraining, "measured": found}
    return {
        "kind": CARD,
        "arch": source.arch,
        "stem": source.stem,
        "size": source.size,
        "channels": source.channels,
        "mean": mean,
        "std": std,
        "width": _compute(source.encoder, source, keep_head=False).shape[1],
        "changes": source.changes,
        "source": os.path.basename(source.file.path),
        "epoch": epoch if isinstance(epoch, int) else None,
        **{name: value for name, value in known.items() if value},
    }


def keep_the_head(source: Backbone) -> dict[str, list[str]]:
    """Put the file's own linear classifier in place of the fresh head; the names of its classes for the card, where the
    file has them.

    Raises:
        UserError: the file's head is not one linear layer, or its tensors are odd.
    """
    head = head_of(source.encoder)
    entries = head_entries(source.encoder, source.file)
    weight, fresh = entries.get("weight"), source.encoder.get_submodule(head)
    if set(entries) != {"weight", "bias"} or weight is None or weight.ndim != 2 or not isinstance(fresh, nn.Linear):
        raise UserError(f"{source.file.path} has no head of one linear layer to keep; leave out --head keep.")
    linear = nn.Linear(fresh.in_features, weight.shape[0])
    linear.load_state_dict(entries)
    source.encoder.set_submodule(head, linear)
    classes = run_of(source.file.state).get("classes") or source.file.settings.get("classes") or []
    return {"classes": list(classes)} if len(classes) == linear.out_features else {}


# -------------------------------------------------------------------------------------------------- libraries


def library_arch(arch: str, to: str) -> str:
    """The name under which :func:`moco.models.encoder.build_encoder` builds the same network from the other library.

    Raises:
        UserError: it has none.
    """
    bare = arch.removeprefix("timm/")
    if to == "torchvision":
        name = {theirs: ours for ours, theirs in TORCHVISION_VITS.items()}.get(bare, bare)
        if name in torchvision_names():
            return name
    else:
        import timm

        name = TORCHVISION_VITS.get(bare, bare)
        if timm.is_model(name):
            return f"timm/{name}"
    raise UserError(f"{to} has no network {bare}; export it to another kind, such as safetensors.")


def timm_name(name: str) -> str:
    """The name in timm's ViT of an entry of torchvision's."""
    for pattern, replacement in _VIT_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


class InLibrary(NamedTuple):
    """An encoder in another library: its name there, as :func:`moco.models.encoder.build_encoder` has it, the network,
    the tensors by the library's names, and how far the features are from the source's."""

    arch: str
    target: nn.Module
    tensors: dict[str, Tensor]
    gap: float


def _in_library(source: Backbone, to: str, keep_head: bool) -> InLibrary:
    arch = library_arch(source.arch, to)
    target = build_encoder(arch, 1, stem=source.stem, size=source.size, in_chans=source.channels).eval()
    if keep_head:
        head = source.encoder.get_submodule(head_of(source.encoder))
        assert isinstance(head, nn.Linear)
        target.set_submodule(head_of(target), nn.Linear(head.in_features, head.out_features))
    wrapped = "backbone." if hasattr(target, "backbone") else ""  # moco.models.encoder.Headed: not the library's head
    if wrapped and keep_head:
        raise UserError(f"{arch} has no head of one linear layer; leave out --head keep.")
    tensors = _renamed(_entries(source.encoder, keep_head), target)
    if other := differing(_entries(target, keep_head), tensors):
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise UserError(f"the target's network has other entries: {', '.join(other[:3])}{more}; {_NOTHING_WRITTEN}")
    target.load_state_dict(tensors, strict=False)
    apply_changes(target, source.changes)
    gap = _gap(_compute(source.encoder, source, keep_head), _compute(target, source, keep_head))
    if not gap <= FEATURE_TOLERANCE:
        raise UserError(f"{to}'s {arch} computes other features (relative difference {gap:.1e}); {_NOTHING_WRITTEN}")
    return InLibrary(arch, target, {name.removeprefix(wrapped): value for name, value in tensors.items()}, gap)


def _to_library(source: Backbone, to: str, out: str, card: dict[str, Any], keep_head: bool) -> list[str]:
    arch, target, tensors, gap = _in_library(source, to, keep_head)
    lines = [_write_with_card(tensors, out, {**card, "arch": arch})]
    if summary := describe_changes(source.changes):
        lines.append(f"{to}'s own network differs, and the file cannot say so: the lines below give it {summary}")
    lines.append(f"{to} computes the same (relative difference {gap:.0e}); load it with")
    return lines + _loading(source, to, arch, target, out, keep_head)


def _renamed(tensors: dict[str, Tensor], target: nn.Module) -> dict[str, Tensor]:
    """Torchvision's and timm's ViT in each other's names; ResNets and all others have the same in both."""
    names = set(target.state_dict())
    if "class_token" in tensors and "cls_token" in names:
        return {timm_name(name): value for name, value in tensors.items()}
    if "cls_token" in tensors and "class_token" in names:
        back = {timm_name(name): name for name in names}
        return {back.get(name, name): value for name, value in tensors.items()}
    return tensors


def _loading(source: Backbone, to: str, arch: str, target: nn.Module, out: str, keep_head: bool) -> list[str]:
    """Lines of Python that build the library's network and load the file strictly."""
    head, core = head_of(target), cast("Any", getattr(target, "backbone", target))
    classes = core.get_submodule(head).out_features if keep_head else 0
    if to == "timm":
        make, options = "timm.create_model", {"num_classes": classes}
        if core.pretrained_cfg.get("fixed_input_size") and core.pretrained_cfg["input_size"][-1] != source.size:
            options["img_size"] = source.size
        if source.channels != 3:
            options["in_chans"] = source.channels
        options |= {name: value for name, value in source.changes.items() if name == "num_heads"}
    else:
        make, options = "torchvision.models.get_model", {"num_classes": classes} if keep_head else {}
        if hasattr(target, "image_size") and source.size != 224:
            options["image_size"] = source.size
    named = ", ".join([repr(arch.removeprefix("timm/")), *(f"{name}={value}" for name, value in options.items())])
    lines = ["import torch", f"import {to}", f"model = {make}({named})", *_stem_lines(source, to, target)]
    if to == "torchvision" and not keep_head:
        lines.append(f"model.set_submodule({head!r}, torch.nn.Identity())  # features instead of logits")
    return [*lines, f"model.load_state_dict(torch.load({out!r}, weights_only=True))"]


def _stem_lines(source: Backbone, to: str, target: nn.Module) -> list[str]:
    first, conv = next((n, module) for n, module in target.named_modules() if isinstance(module, nn.Conv2d))
    lines = []
    if source.stem == "cifar" or (to == "torchvision" and source.channels != 3):
        padding = source.changes.get("stem_padding", conv.padding[0])
        settings = f"{conv.in_channels}, {conv.out_channels}, {conv.kernel_size[0]}, {conv.stride[0]}, {padding}"
        bias = "" if conv.bias is not None else ", bias=False"
        lines.append(f"model.set_submodule({first!r}, torch.nn.Conv2d({settings}{bias}))")
    gone = {"maxpool"} if source.stem == "cifar" else set()
    gone |= set(bare_names(target)) if "bare_stem" in source.changes else set()
    return lines + [f"model.{name} = torch.nn.Identity()" for name in sorted(gone)]


def _to_hub(source: Backbone, out: str, card: dict[str, Any], keep_head: bool) -> list[str]:
    hub.check_timm_builds(source.stem, source.changes, source.file.path)
    arch, target, tensors, _ = _in_library(source, "timm", keep_head)
    head, network = head_of(target), cast("Any", getattr(target, "backbone", target))
    classes = network.get_submodule(head).out_features if keep_head else 0
    made = {**card, "arch": arch}
    config = hub.config_of(network, arch.removeprefix("timm/"), made, classes)
    with torch.no_grad():
        found = hub.built_by_timm(config, tensors)(_images(source))
    gap = _gap(_compute(source.encoder, source, keep_head), found)
    if not gap <= FEATURE_TOLERANCE:
        raise UserError(f"timm's {arch} computes other values (relative difference {gap:.1e}); {_NOTHING_WRITTEN}")
    name = os.path.basename(os.path.abspath(out))
    hub.write_folder(out, config, tensors, made, model_card.readme(made, name, config))
    lines = [f"wrote {', '.join(os.path.join(out, name) for name in (hub.CONFIG, hub.WEIGHTS, hub.README))}"]
    lines.append(f"timm computes the same (relative difference {gap:.0e}); load it with (timm 1.0.26 or later)")
    return [*lines, "import timm", f"model = timm.create_model({'local-dir:' + out!r}, pretrained=True)"]


def _to_detectron2(source: Backbone, out: str, card: dict[str, Any]) -> list[str]:
    known = detectron2_names.ARCHS
    if source.arch.removeprefix("timm/") not in known or source.stem == "cifar" or source.channels != 3:
        raise UserError(
            f"detectron2's configurations are for {' and '.join(known)} with a 7x7 stem and colour images, not for "
            f"{source.arch} with {source.stem} stem and {source.channels} channels; choose another --to."
        )
    tensors = detectron2_names.renamed(_entries(source.encoder), source.encoder, source.file.path)
    beside = _card_path(out)
    detectron2_names.write_pickle(tensors, out)
    files.write_text(json.dumps(card, indent=1) + "\n", beside, "--out")
    pixels = detectron2_names.pixel_options(card["mean"], card["std"])
    return [
        f"wrote {out} and {beside}",
        f"{len(tensors)} arrays; give the file as {' '.join(['MODEL.WEIGHTS', *pixels])}",
    ]


# ------------------------------------------------------------------------------------------------------- onnx


class FeatureModule(nn.Module):
    """From normalised images (N, channels, size, size) to features (N, F), without a head."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        encoder.set_submodule(head_of(encoder), nn.Identity())

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images).flatten(1)


def _to_onnx(source: Backbone, out: str, card: dict[str, Any], keep_head: bool) -> list[str]:
    need = "--to onnx needs onnx and onnxscript"
    onnx = resources.package("onnx", "export", need)
    resources.package("onnxscript", "export", need)  # which torch needs
    expected = _compute(source.encoder, source, keep_head)
    model = source.encoder if keep_head else FeatureModule(source.encoder).eval()
    name = "logits" if keep_head else "features"
    with bars.bar(3, desc="ONNX: graph") as shown:
        graph = _traced(model, source, name)
        onnx.helper.set_model_props(graph, {"card": json.dumps(card)})
        shown.update()
        shown.set_description("ONNX: check")
        checked = _checked(graph, source, model, expected)
        shown.update()
        with files.replacing(out, "--out") as beside:
            onnx.save(graph, beside)
    shape = f"(batch, {source.channels}, {source.size}, {source.size})"
    feed = f"input images {shape}, normalised by the card's mean and std; output {name}; {checked}"
    return [f"wrote {out}", feed]


def _traced(model: nn.Module, source: Backbone, name: str) -> Any:
    try:
        program = torch.onnx.export(
            model, (_images(source),), dynamo=True, input_names=["images"], output_names=[name],
            dynamic_shapes=({0: torch.export.Dim("batch", max=MOST_IMAGES)},), verbose=False,
        )  # fmt: skip
    except RuntimeError as error:  # a network that this torch cannot trace
        reason = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"torch {torch.__version__} cannot write this as ONNX ({reason}); try a newer one.") from error
    assert program is not None
    return program.model_proto


def _checked(graph: Any, source: Backbone, model: nn.Module, expected: Tensor) -> str:
    """Compare with onnxruntime at two batch sizes; words on how it went."""
    try:
        import onnxruntime
    except ImportError:
        return "not run: onnxruntime is not installed"
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    images = _images(source).numpy()
    computed = {count: session.run(None, {"images": images[:count]})[0] for count in (len(expected), 1)}
    gaps = [_gap(expected[:count], torch.from_numpy(found)) for count, found in computed.items()]
    if not all(gap <= ONNX_TOLERANCE for gap in gaps):  # also false for NaN
        raise UserError(f"onnxruntime computes other values (relative differences {gaps}); {_NOTHING_WRITTEN}")
    return f"onnxruntime computes the same (relative difference {max(gaps):.0e})"


# -------------------------------------------------------------------------------------------------- small parts


def _entries(encoder: nn.Module, keep_head: bool = False) -> dict[str, Tensor]:
    """The tensors to write, all or those of the backbone."""
    kept = backbone_keys(encoder)
    return {n: value.contiguous() for n, value in encoder.state_dict().items() if keep_head or n in kept}


def _images(source: Backbone) -> Tensor:
    """(3, channels, size, size) images that are the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, source.channels, source.size, source.size, generator=generator)


@torch.no_grad()
def _compute(encoder: nn.Module, source: Backbone, keep_head: bool) -> Tensor:
    """(3, F) features, or logits, of the same three images."""
    return encoder(_images(source)) if keep_head else features(encoder, _images(source))


def _gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max().clamp_min(1e-12)) if one.shape == other.shape else 1.0


def _card_path(out: str) -> str:
    """Where the card goes; UserError where it would replace what is no card."""
    beside = os.path.splitext(out)[0] + ".json"
    if beside == out or (os.path.exists(beside) and files.read_json(beside).get("kind") != CARD):
        raise UserError(f"the card goes to {beside}, which is something else; choose another --out.")
    return beside


def _write_with_card(tensors: dict[str, Tensor], out: str, card: dict[str, Any]) -> str:
    """What was written, for the console."""
    beside = _card_path(out)
    with files.replacing(out, "--out") as path, open(path, "wb") as file:
        files.torch_save(tensors, file)
    files.write_text(json.dumps(card, indent=1) + "\n", beside, "--out")
    return f"wrote {out} and {beside}"
