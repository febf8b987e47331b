"""Shared by the tests: tiny image folders, a checkpoint, and the entry points run as a user runs them."""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.browser import browse, browser  # noqa: F401 (fixtures)
from torch import nn

from moco import signals
from moco.errors import STOP_EXIT
from moco.models.encoder import build_encoder

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cpu"  # where the suites of Triton programs run: interpreted, or compiled on a card under ``pytest -m gpu``
torch.set_num_threads(1)  # many small networks; threads of tests that run side by side would wait for each other

# A network (timm's, 0.4 million parameters) and sizes with which a step takes milliseconds.
ARCH = "test_resnet"
TINY = [
    "-a", ARCH, "--size", "16", "-b", "8", "--moco-k", "20", "--moco-dim", "16", "-j", "0", "--amp", "off",
    "--knn-every", "0", "--seed", "3", "-p", "1",
]  # fmt: skip
SYNCO = ["--n-hard", "8", "--n1", "4", "--n2", "4", "--n3", "4", "--n4", "2", "--n5", "2", "--n6", "2",
         "--warmup-epochs", "0"]  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Under ``-m gpu`` the tensors of these suites lie on the card, and the suites themselves are collected."""
    global DEVICE
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in what a script has begun in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        DEVICE = "cuda"
        config.addinivalue_line("python_files", "*_interpreted.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = set((ROOT / "tests" / "slow.txt").read_text().split())
    for item in items:
        if item.nodeid.removeprefix("tests/").split("[")[0] in slow:
            item.add_marker("slow")
        if DEVICE == "cuda" and item.path.name.endswith("_interpreted.py"):
            item.add_marker("gpu")
        if (
            DEVICE == "cuda"
        ):  # drivers and libraries warn of what is no fault of a program, each version of something else
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not (DEVICE == "cuda" and torch.cuda.is_available()):
        pytest.skip("a machine without a GPU: `pytest -m gpu` runs this test on one")


def assert_runs_there() -> None:
    """Triton programs run where the suite's tensors lie: by the interpreter on the CPU, compiled on a card."""
    from moco.kernels import by_triton

    assert by_triton.interpreted() == (DEVICE == "cpu"), "set TRITON_INTERPRET=1, or unset it and run pytest -m gpu"


def rounding(terms: int) -> float:
    """What a float32 result of so many sums and products in a row may err by, relative to their absolute values, in
    whatever order a processor's library sums: terms 2^-24 (Higham, Accuracy and Stability, section 3.1)."""
    return terms * 2**-24


@pytest.fixture(autouse=True)
def stop_code(monkeypatch) -> None:
    """Each test begins with the exit code of SIGUSR1 that a program begins with; an entry point may set another."""
    monkeypatch.setitem(signals.CODES, signal.SIGUSR1, STOP_EXIT)


@pytest.fixture(autouse=True)
def no_listener_stays():
    """A command that a test calls in this process listens to signals until its process ends, and blocks them."""
    yield
    signals.end()


@pytest.fixture(autouse=True)
def no_process_stays() -> Iterator[None]:
    """What a test forks holds the pipes of this process, the browser's among them, which then waits at its end for a
    pipe to close: a loader that an exception's trace keeps alive would keep its processes too."""
    yield
    for process in multiprocessing.active_children():
        process.terminate()
        process.join(5)
        process.kill()
        process.join()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """Two classes, train (24 images) and val (8), 20 x 20 pixels, colours by class."""
    colours = {"blue": (30, 30, 200), "red": (200, 30, 30)}
    return write_images(
        tmp_path_factory.mktemp("images"), {"train": 12, "val": 4}, list(colours),
        lambda rng, label: np.array(list(colours.values())[label]) + rng.integers(-30, 30, (20, 20, 3)), seed=0,
    )  # fmt: skip


def write_images(
    root: Path,
    counts: dict[str, int],
    classes: list[str],
    draw: Callable[[np.random.Generator, int], np.ndarray],
    *,
    seed: int = 1,
    name: str = "{i}.png",
) -> Path:
    """An image folder with ``counts`` images of each class in train and val, drawn by ``draw(rng, label)``."""
    rng = np.random.default_rng(seed)
    for split, count in counts.items():
        for label, class_ in enumerate(classes):
            folder = root / split / class_
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(draw(rng, label), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / name.format(split=split, label=label, i=i))
    return root


def hard_images(root: Path, train: int, val: int, name: str = "{i}.png") -> Path:
    """Three classes that a random encoder tells apart badly, 16 x 16 pixels; so many images of each."""
    classes = [f"class{label}" for label in range(3)]
    return write_images(
        root, {"train": train, "val": val}, classes,
        lambda rng, label: rng.integers(0, 200, (16, 16, 3)) + 15 * label, name=name,
    )  # fmt: skip


@pytest.fixture(scope="session")
def hard_folder(tmp_path_factory) -> Path:
    """24 images to train on, 15 held out."""
    return hard_images(tmp_path_factory.mktemp("hard"), 8, 5)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """What fine-tuning is tested on: hard classes, 60 images to train on, 15 to test on, their names unique."""
    return hard_images(tmp_path_factory.mktemp("images"), 20, 5, "{label}_{i}.png")


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> Path:
    """A contrastive checkpoint in upstream's layout, its running statistics not those of a fresh network."""
    torch.manual_seed(0)
    encoder = build_encoder("test_resnet", 16, mlp=True, size=16)
    for _ in range(30):
        encoder(torch.randn(8, 3, 16, 16))
    return save_pretrained(tmp_path_factory.mktemp("pretrained") / "checkpoint_0001.pth.tar", encoder)


@pytest.fixture(scope="session")
def resnet50() -> nn.Module:
    """What detection takes over: a ResNet-50 with MoCo v2's head, its running statistics not a fresh network's."""
    torch.manual_seed(0)
    encoder = build_encoder("resnet50", 128, mlp=True).eval()
    for norm in (m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -0.1, 0.1)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return encoder


@pytest.fixture(scope="session")
def encoder() -> nn.Module:
    """A fresh network with a linear head, in eval mode."""
    torch.manual_seed(0)
    return build_encoder("test_resnet", 16, size=16).eval()


@pytest.fixture(scope="session")
def saved(encoder, tmp_path_factory) -> str:
    """Path of the checkpoint of ``encoder``."""
    return str(save_pretrained(tmp_path_factory.mktemp("encoder") / "checkpoint_0001.pth.tar", encoder))


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """The number of images of each pass of an encoder over a set."""
    from moco.eval.features import FeatureExtractor

    seen, original = [], FeatureExtractor._passes

    def watch(self, encoder, batches, head):
        seen.append(batches.sampler.n)
        return original(self, encoder, batches, head)

    monkeypatch.setattr(FeatureExtractor, "_passes", watch)
    return seen


def save_pretrained(path: Path, encoder: nn.Module, arch: str = "test_resnet", epoch: int = 2) -> Path:
    """Write the encoder as a contrastive checkpoint in upstream's layout."""
    entries = {f"module.encoder_q.{name}": value for name, value in encoder.state_dict().items()}
    torch.save({"epoch": epoch, "arch": arch, "state_dict": entries, "optimizer": {}}, path)
    return path


def environment(**more: str) -> dict[str, str]:
    """This environment without a scheduler's variables, one thread a process."""
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_", "OMPI_", "PMI_", "PBS_", "MASTER_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def run(script: str, *words: object, env: dict[str, str] | None = None, **options) -> subprocess.CompletedProcess[str]:
    """Run an entry point from the top of the repository and wait for it."""
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    return subprocess.run(
        command, env=env or environment(), capture_output=True, text=True, timeout=300, cwd=ROOT, **options
    )


# ---------------------------------------------------------------------------------------------- many processes
# Importing torch costs seconds of every new process. A server that has imported it forks them instead: real processes
# with their own signals, exit codes and process groups, in milliseconds.


class Worker:
    """The worker of a run whose processes write their output to a file and say who they are; ``main`` replaces it."""

    def __init__(self, out: Path, main: Callable[[Any], int | None] | None = None):
        self.out, self.main = out, main

    def __call__(self, args: Any) -> int | None:
        import main_pretrain
        from moco import distributed

        _redirect(self.out)
        torch.set_num_threads(1)
        os.write(1, f"rank {distributed.rank()} is process {os.getpid()}\n".encode())  # in one piece
        return (self.main or main_pretrain.worker)(args)


def _redirect(out: Path, err: Path | None = None) -> None:
    with open(out, "a") as file, open(err or out, "a") as errors:
        os.dup2(file.fileno(), 1)
        os.dup2(errors.fileno(), 2)


def _be_the_script(path: Path, words: list[str], out: Path, err: Path) -> None:
    _redirect(out, err)
    kept = environment()
    os.environ.clear()
    os.environ.update(kept)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.argv = [str(path), *words]
    runpy.run_path(str(path), run_name="__main__")


def _be_the_program(words: list[str], out: Path, main: Callable | None, variables: dict[str, str]) -> None:
    from moco import cli, distributed

    os.environ.update(variables)
    os.setpgrp()  # a signal to the program's group is none to the tests
    tempfile.tempdir = None  # what TMPDIR says now
    _redirect(out)
    torch.set_num_threads(1)
    torch.multiprocessing.get_context = lambda method: multiprocessing.get_context("fork")  # one thread so far
    multiprocessing.set_start_method("fork", force=True)  # of loader workers; a server's child has inherited a server's
    sys.exit(distributed.launch(Worker(out, main), cli.parse_pretrain(words)))


def server() -> multiprocessing.context.ForkServerContext:
    """What starts processes that have imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["main_pretrain", "timm", "torch.utils.tensorboard"])
    return context


def fork(target: Callable, *args: object) -> multiprocessing.process.BaseProcess:
    """Start ``target(*args)`` in a process of the server's."""
    process = server().Process(target=target, args=args)
    process.start()
    return process


def two_of(target: Callable[[int, str], None], folder: Path) -> None:
    """``target(rank, folder)`` in two processes, to their end."""
    processes = [fork(target, rank, str(folder)) for rank in range(2)]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0


def run_script(folder: Path, path: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """A script as its own process and from its first line to its last, without the seconds of importing torch."""
    out, err = folder / "out", folder / "err"
    out.write_text("")
    err.write_text("")
    process = fork(_be_the_script, path, [*map(str, words)], out, err)
    process.join(300)
    process.kill()
    process.join()
    assert process.exitcode is not None
    return subprocess.CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())


def wait_until(true: Callable[[], object], why: str = "it did not come true") -> None:
    """Return when ``true()`` is."""
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, why
        time.sleep(0.01)


class Program:
    """main_pretrain.py as a process: ``words`` are its flags, ``main`` a worker in place of its own."""

    def __init__(self, out: Path, *words: object, main: Callable | None = None, **variables: str):
        self.out = out
        out.write_text("")
        self.process = fork(_be_the_program, [*map(str, words)], out, main, variables)

    @property
    def text(self) -> str:
        return self.out.read_text()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def wait_for(self, words: str, times: int = 1) -> None:
        """Return when the output holds ``words`` so often."""
        deadline = time.monotonic() + 120
        while self.text.count(words) < times:
            assert self.process.is_alive() and time.monotonic() < deadline, f"no {words!r} in:\n{self.text}"
            time.sleep(0.01)

    def pid_of_rank(self, rank: int) -> int:
        self.wait_for(f"rank {rank} is process")
        return int(self.text.split(f"rank {rank} is process ")[1].split()[0])

    def end(self) -> int:
        """Its exit code, when it has ended."""
        self.process.join(120)
        assert self.process.exitcode is not None, f"still running:\n{self.text}"
        return self.process.exitcode


@pytest.fixture
def start(tmp_path):
    """Start the program: ``start(*flags, main=None, **environment)`` returns a :class:`Program`."""
    begun: list[Program] = []

    def begin(*words: object, main: Callable | None = None, **variables: str) -> Program:
        begun.append(Program(tmp_path / f"output{len(begun)}", *words, main=main, **variables))
        return begun[-1]

    yield begin
    for program in begun:
        program.process.kill()
        program.process.join()


@pytest.fixture
def full_disk() -> Callable[[int], contextlib.AbstractContextManager]:
    """``with full_disk(n)``: no file can grow beyond n bytes, as if the disk had no more room for it."""

    @contextlib.contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture
def alone(monkeypatch) -> None:
    """No scheduler's variables in this process."""
    for name in set(os.environ) - set(environment()):
        monkeypatch.delenv(name)


@pytest.fixture
def restored() -> Iterator[None]:
    """What an entry point sets in its process is afterwards as it was."""
    flags, threads = (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark), torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = flags
    signals.end()


@pytest.fixture
def in_process(alone, restored) -> Callable[..., int]:
    """The program in this process: ``in_process(*flags)`` returns its exit code; one thread, as in ``start``."""
    from main_pretrain import worker
    from moco import cli, distributed

    torch.set_num_threads(1)

    def begin(*words: object) -> int:
        return distributed.launch(worker, cli.parse_pretrain([*map(str, words)]))

    return begin


def records(path: Path) -> list[dict]:
    """The lines of a log: of a file, or of the one in a run's folder; without what a clock says, which no two share."""
    (path,) = (p for p in path.glob("*.jsonl") if "_events" not in p.name) if path.is_dir() else (path,)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in record.items() if name not in ("time", "step_ms")} for record in found]


def spoiled(folder: Path, copy: Path, count: int) -> Path:
    """A copy of the folder in which so many held-out images of class1 cannot be read."""
    shutil.copytree(folder, copy)
    for path in sorted((copy / "val" / "class1").iterdir())[:count]:
        path.write_bytes(b"no picture")
    return copy


def load(path: Path | str) -> dict:
    """A checkpoint; the newest one of a folder."""
    from moco import files, run_folder

    found = run_folder.newest(str(path)) if os.path.isdir(path) else str(path)
    assert found, f"no checkpoint in {path}"
    return files.read(found)


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Names of the entries of two checkpoints whose bits differ."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [where]
    if isinstance(one, dict) and isinstance(other, dict):
        names = [f"{where}.{n}" for n in one.keys() ^ other.keys()]
        return names + [d for n in one.keys() & other.keys() for d in differences(one[n], other[n], f"{where}.{n}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [d for i, pair in enumerate(zip(one, other, strict=True)) for d in differences(*pair, f"{where}[{i}]")]
    return [] if type(one) is type(other) and one == other else [where]


def mend_interpreter() -> None:
    """Let the interpreters of Triton before 3.7 run under numpy 2.4, which makes no integer of an array with one axis:
    they ask for one at every loop bound ("only 0-dimensional arrays can be converted to Python scalars"). And let all
    multiply in the precision asked for, bf16 rounded and not cut, as a GPU does."""
    from triton.runtime import interpreter

    _patch_once_a_launch(interpreter)
    patch = interpreter._patch_lang_tensor

    def with_integers(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = with_integers
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, sum, precision, _: interpreter.TensorHandle(
        sum.data + _product(*(_unrounded(x) for x in (a, b)), str(precision)), sum.dtype.scalar
    )
    total = interpreter.ReduceOps.sum

    def narrow(self: Any, input: Any) -> Any:  # triton 3.2 keeps numpy's int64, and stores 8 bytes for each int32
        found = total(self, input)
        found.handle.data = found.handle.data.astype(input.handle.data.dtype)
        return found

    interpreter.ReduceOps.sum = narrow
    cast = interpreter.InterpreterBuilder.cast_impl

    def rounded(self: Any, source: Any, to: Any) -> Any:
        if (str(source.dtype.scalar), str(to.scalar)) != ("fp32", "bf16"):
            return cast(self, source, to)
        bits = torch.from_numpy(source.data).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return interpreter.TensorHandle(bits, to.scalar)

    interpreter.InterpreterBuilder.cast_impl = rounded


def _patch_once_a_launch(interpreter: Any) -> None:
    """The interpreter puts its own operators into triton.language at each launch, and anew at every call of a function
    within one, for which it looks through the whole module: a third of a suite's time. Once for all modules will do."""
    import triton.language as tl

    patch = interpreter._patch_lang
    sees_all = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
    interpreter._patch_lang = lambda _: patch(sees_all)
    interpreter.InterpretedFunction.__call__ = lambda self, *given, **named: self.rewrite()(*given, **named)


def _unrounded(handle: Any) -> np.ndarray:
    """The numbers of an interpreter's tensor; it keeps bf16 as the bits, and multiplies those."""
    bits = handle.data
    return (bits.astype(np.uint32) << 16).view(np.float32) if bits.dtype == np.uint16 else bits


def _product(a: np.ndarray, b: np.ndarray, precision: str) -> np.ndarray:
    """a @ b of operands in the precision that a GPU multiplies in; the interpreter alone has float32 for all."""
    if not precision.upper().split(".")[-1].startswith("TF32"):
        return a @ b
    high = [_tf32(x) for x in (a, b)]
    if not precision.upper().endswith("X3"):
        return high[0] @ high[1]
    low = [_tf32(x - of_x) for x, of_x in zip((a, b), high, strict=True)]
    return low[0] @ high[1] + high[0] @ low[1] + high[0] @ high[1]


def _tf32(x: np.ndarray) -> np.ndarray:
    """x (float32) cut to the 10 bits of a tf32 fraction."""
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def interpreted(suite: str) -> int:
    """Run a suite of Triton programs below tests/ in a process that chose the interpreter before triton was imported.

    Returns how many tests passed; none may fail or be skipped.
    """
    words = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(ROOT / "tests" / suite)]
    env = environment(TRITON_INTERPRET="1")
    # the limit is of a hang: the longest suite takes 3 minutes on most machines and above 11 on a slow, busy one
    child = subprocess.run(words, env=env, capture_output=True, text=True, timeout=3000, cwd=ROOT)
    assert child.returncode == 0, child.stdout + child.stderr
    passed = re.search(r"(\d+) passed", child.stdout)
    assert passed, child.stdout
    assert "skipped" not in child.stdout
    return int(passed.group(1))


@pytest.fixture(scope="module")
def resources() -> Any:
    """benchmarks/speed/kernel_resources.py as a module."""
    return importlib.import_module("benchmarks.speed.kernel_resources")


@pytest.fixture(scope="module")
def script() -> Callable[[str], Any]:
    """``script(name)``: a module of benchmarks/."""
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def launched_by(module: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what ``module`` of moco.kernels launches from now on, on tensors of a GPU that have no data: whatever
    asks for a value raises."""
    from moco.kernels import by_triton

    found: list[str] = []
    monkeypatch.setattr(by_triton, "run_program", lambda program, *_, **__: found.append(program.fn.__name__))
    monkeypatch.setattr(module, "agrees", lambda *case: True)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
    return found
