"""The commands of this project, how one was typed, and what is said of a name or a module that is none. No torch here.

``moco NAME``, ``python -m moco NAME`` and ``python -m moco.NAME`` are one command; pretrain, lincls and semisup are
also ``moco-NAME`` and ``python main_NAME.py``.
"""

from __future__ import annotations

import difflib
import os
import shlex
import shutil
import sys
from collections.abc import Callable

from moco.errors import USAGE_EXIT, tell
from moco.resources import DETECTION

COMMANDS = {  # in the order of a user's work
    "getting started": {
        "demo": "pretrain on 4,000 handwritten digits and show what the network has learned",
    },
    "before training": {
        "data": "check, show, index or pack images of your own",
        "bench": "measure where the time of a training step goes on this machine",
    },
    "training": {
        "pretrain": "pretrain an encoder with MoCo, MoCHi, SynCo, SimCLR, SupCon, HCL, DCL or MoCo v3",
        "average": "average the weights of several checkpoints",
    },
    "evaluation": {
        "lincls": "linear probe, k-NN or few-shot accuracy of frozen features",
        "semisup": "fine-tune on all labels or a share of them",
        "retrieval": "retrieval and clustering measures of frozen features",
        "detection": "fine-tune detectors on VOC or COCO with detectron2 and report AP",
        "sweep": "run a grid of settings, select one on a validation figure, report its test figure",
    },
    "looking at it": {
        "report": "write a page with the curves, settings and warnings of runs",
        "neighbours": "show images beside the images whose features are nearest",
        "negatives": "show queries with their hardest and synthetic negatives, and count false negatives",
    },
    "using a checkpoint": {
        "describe": "say what a checkpoint is and whether it is intact",
        "embed": "write the features of images, and a map of the images to look into",
        "export": "write the backbone for torchvision, timm, detectron2, safetensors or ONNX",
    },
}
MAINS = ("pretrain", "lincls", "semisup")
NAMES = [name for group in COMMANDS.values() for name in group]
# what `python -m` starts, and in other words a path to: the module of each command
MODULES = {name: f"moco.mains.main_{name}" if name in MAINS else f"moco.{name}" for name in NAMES}
MODULES["detection"] = f"{DETECTION}.run"
OTHERS = {f"{DETECTION}.{name}" for name in ("train_net", "convert-pretrain-to-detectron2", "install_for_ci")}
# what somebody may look for under the name of a module
ALSO = {
    "knn": "lincls --knn", "fewshot": "lincls --few-shot", "few_shot": "lincls --few-shot",
    "lr_find": "lincls --lr-find", "linear": "lincls", "probe": "lincls",
    "finetune": "semisup", "pretraining": "pretrain", "train": "pretrain", "loop": "pretrain", "trainer": "detection",
    # programs of the projects that --compat knows
    "supcon": "pretrain --compat supcontrast", "ce": "semisup --compat supcontrast",
    "synco": "pretrain --compat synco", "train_contrastive": "pretrain --compat mochi",
    "run_beit3_finetuning": "semisup --compat schane", "swa": "average", "learning_rate_finder": "lincls --lr-find",
    "detectron2_names": "export", "pack": "data pack", "neighbors": "neighbours", "nearest": "neighbours",
}  # fmt: skip


def listing(moco: str) -> str:
    """What `moco` prints without a command; ``moco``: how it was typed."""
    lines = [f"usage: {moco} COMMAND [flags]", "", "Contrastive pretraining of image encoders with hard negatives."]
    for title, commands in COMMANDS.items():
        lines += ["", f"{title}:", *(f"  {name:10} {summary}" for name, summary in commands.items())]
    return "\n".join([*lines, "", f"{moco} COMMAND --help lists the flags of a command; {moco} --version its version."])


def instead(word: str, moco: str) -> str:
    """The end of a sentence on a word that is no command: what to type instead; ``moco``: how it is typed."""
    word = word.lower().replace("-", "_").removesuffix(".py").removeprefix("main_")
    if word in NAMES or word in ALSO:
        return f"; type `{moco} {ALSO.get(word, word)}`"
    near = difflib.get_close_matches(word, [*NAMES, *ALSO], 1, cutoff=0.75)
    return f"; did you mean `{moco} {ALSO.get(near[0], near[0])}`?" if near else f"; `{moco}` lists the commands"


def started() -> tuple[str, str]:
    """The command that this process runs and how it was typed: ("embed", "python -m moco.embed"); empty where it runs
    none."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec else ""
    script = "" if module else os.path.basename(sys.argv[0])
    if script == "__main__.py" and os.path.basename(os.path.dirname(sys.argv[0])) == "moco":
        module = "moco"  # a process that multiprocessing has started, which has no spec
    if "moco" in (module, script) and len(sys.argv) > 1:
        return sys.argv[1], f"{'python -m ' * bool(module)}moco {sys.argv[1]}"
    for name, own in MODULES.items():
        if module == own:
            return name, f"python -m {own}"
        if script == f"{own.rpartition('.')[2]}.py":
            return name, f"python {shlex.quote(sys.argv[0])}"
        if script == f"moco-{name}":
            return name, script
    return "", ""


def command() -> str:
    """The whole command that this process runs, for a shell; empty where it runs none of ours."""
    return _line(lambda flags: flags)


def again() -> str:
    """The command that goes on with this process's run; empty where it runs none of ours."""
    return _line(_resumed)


def resumed(line: str) -> str:
    """The command that goes on with the run that this one began."""
    return shlex.join(_resumed(shlex.split(line)))


def beside(name: str, words: list[str]) -> str:
    """A command for a shell, in the way that this process's own was typed: `python main_lincls.py` beside
    `python main_pretrain.py`."""
    own, typed = started()
    if own in MAINS and name in MAINS:
        start, _, end = typed.rpartition(own)
        program = start + name + end
    elif typed.startswith("python ") and not typed.startswith("python -m moco "):
        program = f"python -m {MODULES[name]}"
    else:
        program = typed.removesuffix(own) + name if typed.endswith(f"moco {own}") else f"moco {name}"
    return f"{_runnable(program)} {shlex.join(words)}"


def _line(change: Callable[[list[str]], list[str]]) -> str:
    name, words = started()
    flags = sys.argv[2:] if words in (f"moco {name}", f"python -m moco {name}") else sys.argv[1:]
    return f"{_launched(words)} {shlex.join(change(flags))}".rstrip() if name else ""


def _launched(words: str) -> str:
    """How the program was typed, with who started its processes."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        one = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"  # where several nodes meet is not known
        return _torchrun(words, os.environ.get("LOCAL_WORLD_SIZE", "1"), "" if one else "... ")
    words = _runnable(words)
    if os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return f"srun {words}"
    by_mpi = any(name in os.environ for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK"))
    return f"mpirun {words}" if by_mpi else words


def _torchrun(words: str, processes: object, nodes: str = "") -> str:
    """What is typed as ``words``, as torchrun starts it."""
    program = words.removeprefix("python ") if words.startswith("python ") else f"-m moco {started()[0]}"
    return f"torchrun {nodes}--nproc-per-node {processes} {program}"


def _runnable(words: str) -> str:
    """The same with the path of the program where a shell would not find this one by its name, as where it is of a
    virtual environment that is not active."""
    name, _, more = words.partition(" ")
    path = sys.executable if name == "python" else os.path.join(os.path.dirname(sys.argv[0]), name)
    if not os.path.isfile(path):
        return words
    name, found = os.path.basename(path), shutil.which(os.path.basename(path))
    known = found is not None and os.path.abspath(found) == os.path.abspath(path)
    return f"{name if known else shlex.quote(path)} {more}".rstrip()


def _resumed(flags: list[str]) -> list[str]:
    """The words of a run, as those that go on with it."""
    left = _without(flags, "--resume", "--overwrite")
    end = left.index("--") if "--" in left else len(left)  # behind it nothing is a flag
    return [*left[:end], "--resume", "auto", *left[end:]]


def _without(flags: list[str], value: str, switch: str) -> list[str]:
    """The words without a flag that has a value and without one that has none."""
    left = [word for number, word in enumerate(flags) if not (number and flags[number - 1] == value)]
    return [word for word in left if word not in (value, switch) and not word.startswith(f"{value}=")]


def typed(name: str) -> str:
    """How the command of this name was typed, for usage lines; ``moco NAME`` where it was not."""
    command, words = started()
    return words if command == name else f"moco {name}"


def under_torchrun(processes: int) -> str:
    """The command that this process runs, as it is typed for torchrun; empty where it runs none of ours."""
    name, words = started()
    return f"{_torchrun(words, processes)} ..." if name else ""


def check(package: str) -> None:
    """End with one sentence where ``python -m`` asks for a module of this package that is no command.

    Called by the package itself, which Python imports before the module: then sys.argv begins with "-m" and goes on
    behind the module's name.
    """
    if sys.argv[:1] != ["-m"]:
        return
    name = sys.orig_argv[-len(sys.argv)]
    name = name.partition("m")[2] if name.startswith("-") else name  # -mmoco.knn
    if name.partition(".")[0] == package and not is_door(name):
        sentence = f"{name} is no command{instead(name.rpartition('.')[2], 'python -m moco')}"
        tell(f"error: {sentence}", error=True)
        sys.exit(USAGE_EXIT)


def is_door(module: str) -> bool:
    """Whether ``python -m`` of this module starts something."""
    return module.removesuffix(".__main__") in {"moco", *MODULES.values(), *OTHERS}
