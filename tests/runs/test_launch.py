"""Every way to start a run, two processes against one, and what a user's mistake costs: one sentence, exit code 2."""

import functools
import os
import re
import shutil
import socket

import pytest
import torch
from conftest import SYNCO, TINY, load, records, run
from support.ports import free_port
from support.workers import noting

from moco import distributed
from moco.kernels import contrastive_loss
from moco.models import moco

STEPS = ["--steps", 2]


def trained(folder, text: str, processes: int, steps: int = 2) -> None:
    """The log and the checkpoint of a run that went well."""
    assert ("one process on cpu" if processes == 1 else f"{processes} processes (gloo) on cpu") in text
    assert text.count("images/s") == steps
    assert "Warning" not in text
    state = load(folder)
    assert (state["run"]["step"], state["run"]["batches"]["processes"]) == (steps, processes)


# ------------------------------------------------------------------------------------------------ how it starts


def test_one_process(image_folder, tmp_path, in_process, capsys):
    assert in_process(*TINY, *STEPS, "--save-dir", tmp_path, image_folder) == 0
    trained(tmp_path, capsys.readouterr().out, 1)


def test_the_head_is_the_one_that_the_flags_and_the_log_name(image_folder, tmp_path, in_process, capsys, monkeypatch):
    used = set()

    def watched(*tensors, impl, precision, **others):
        used.add((impl, precision))
        return contrastive_loss(*tensors, impl=impl, precision=precision, **others)

    monkeypatch.setattr(moco, "contrastive_loss", watched)
    flags = ["--head-impl", "cpu", "--head-precision", "bf16", "--save-dir", tmp_path]
    assert in_process(*TINY, *STEPS, *flags, image_folder) == 0
    assert used == {("cpu", "bf16")}
    assert "loss by cpu in bf16" in capsys.readouterr().out


@pytest.mark.dist
@pytest.mark.parametrize(
    ("words", "processes"),
    [
        (["--nproc", 2], 2),
        (["--nproc", 3, "-b", 9], 3),
        (["--nproc", 8, "-b", 16], 8),
        (["--multiprocessing-distributed", "--world-size", 1, "--rank", 0], 1),
        (["--multiprocessing-distributed", "--nproc", 2, "--world-size", 1, "--rank", 0, "--dist-url", "URL"], 2),
        (["--nproc", 2, "--dist-backend", "gloo"], 2),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_processes_started_by_flags(words, processes, image_folder, tmp_path, start):
    words = [f"tcp://localhost:{free_port()}" if word == "URL" else word for word in words]
    steps = 1 if processes == 8 else 2  # 24 images are one batch of 16
    program = start(*TINY, *SYNCO, *words, "--steps", steps, "--save-dir", tmp_path, image_folder)
    assert program.end() == 0, program.text
    trained(tmp_path, program.text, processes, steps)


SCHEDULERS = {
    "SLURM": {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_PROCID": "RANK",
              "SLURM_LOCALID": "RANK", "SLURM_STEP_NODELIST": "localhost"},
    "Open MPI": {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "RANK", "OMPI_COMM_WORLD_LOCAL_RANK": "RANK",
                 "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
    "PBS, Intel MPI": {"PMI_SIZE": "2", "PMI_RANK": "RANK", "MPI_LOCALRANKID": "RANK", "MPI_LOCALNRANKS": "2",
                       "PBS_JOBID": "77.server"},
    "torchrun's": {"RANK": "RANK", "WORLD_SIZE": "2", "LOCAL_RANK": "RANK", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1"},
}  # fmt: skip


@pytest.mark.dist
@pytest.mark.parametrize("name", SCHEDULERS)
def test_processes_started_by_a_scheduler(name, image_folder, tmp_path, start):
    port = str(free_port())
    programs = []
    for rank in (0, 1):
        variables = {key: value.replace("RANK", str(rank)) for key, value in SCHEDULERS[name].items()}
        words = [*TINY, *STEPS, "--save-dir", tmp_path, image_folder]
        programs.append(start(*words, MASTER_PORT=port, **variables))
    assert [program.end() for program in programs] == [0, 0], programs[0].text + programs[1].text
    trained(tmp_path, programs[0].text, 2)
    assert "images/s" not in programs[1].text


@pytest.mark.dist
def test_processes_started_by_hand(image_folder, tmp_path, start):
    """Upstream's flags without --multiprocessing-distributed: world size and rank count processes."""
    words = [*TINY, *STEPS, "--world-size", 2, "--dist-url", f"tcp://127.0.0.1:{free_port()}"]
    words += ["--save-dir", tmp_path, image_folder]
    programs = [start(*words, "--rank", rank) for rank in (0, 1)]
    assert [program.end() for program in programs] == [0, 0], programs[0].text + programs[1].text
    trained(tmp_path, programs[0].text, 2)


# torchrun itself starts a command of the README's, see test_readme.py.


# ----------------------------------------------------------------------------------- two processes are one


@pytest.mark.dist
@pytest.mark.parametrize(
    "words",
    [[], ["--symmetric"], ["--accum", 2, "--moco-k", 300], ["--no-shuffle-bn"]],
    ids=["plain", "symmetric", "accum 2, a large queue", "no shuffle"],
)
def test_two_processes_compute_what_one_does(words, image_folder, tmp_path, start):
    """BatchNorm in one process sees two parts, which are what the two processes hold; so do the shuffled keys."""
    words = [*TINY, "--size", 32, "--epochs", 1, *words, image_folder]
    runs = {1: ["--bn-splits", 2], 2: ["--nproc", 2]}
    programs = {n: start(*words, *more, "--save-dir", tmp_path / str(n), main=noting) for n, more in runs.items()}
    for program in programs.values():
        assert program.end() == 0, program.text
    logs = [records(tmp_path / f"{n}") for n in (1, 2)]
    assert len(logs[0]) == len(logs[1]) >= 1
    for one, two in zip(*logs, strict=True):
        for name in ("loss", "top1", "top5", "hardest", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=2e-3), name
    (one, *_), (two, *_), (other, *_) = (
        torch.load(tmp_path / name, weights_only=True) for name in ("1/rank0.pt", "2/rank0.pt", "2/rank1.pt")
    )
    local = ("running_mean", "running_var")
    for name, value in one.items():  # after one step; later ones amplify the last bit
        if not name.endswith(local):
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
            assert torch.equal(two[name], other[name]), name
    assert torch.equal(one["queue_ids"], two["queue_ids"])


@pytest.mark.dist
def test_synthetic_negatives_leave_the_processes_equal(image_folder, tmp_path, start):
    """Each process draws its own; parameters, key encoder and queue stay the same bits at every step."""
    words = [*TINY, *SYNCO, "--nproc", 2, "--epochs", 2, "--save-dir", tmp_path, image_folder]
    program = start(*words, main=noting)
    assert program.end() == 0, program.text
    one, other = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert len(one) == 6
    for mine, theirs in zip(one, other, strict=True):
        different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
        assert all(name.endswith(("running_mean", "running_var")) for name in different)


def permuting(folder: str, args) -> int:
    """A worker that permutes rows and counts what leaves each process."""
    rank, world, rows = distributed.rank(), distributed.world_size(), 6
    everything = torch.arange(world * rows * 4, dtype=torch.uint8).view(world * rows, 2, 2)
    mine = everything[rank * rows : (rank + 1) * rows]
    sent = []
    exchange = torch.distributed.all_to_all_single

    def counting(output, input, output_sizes, input_sizes):
        sent.append([int(n) for n in input_sizes])
        return exchange(output, input, output_sizes, input_sizes)

    torch.distributed.all_to_all_single = counting
    permutations = [torch.randperm(world * rows, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    permutations += [torch.arange(world * rows), torch.arange(world * rows).flip(0), torch.arange(world * rows).roll(1)]
    for permutation in permutations:
        sent.clear()
        got = distributed.exchange_rows(mine, permutation)
        assert torch.equal(got, everything[permutation][rank * rows : (rank + 1) * rows])
        assert torch.equal(distributed.exchange_rows(got, torch.argsort(permutation)), mine)
        wanted = [(permutation.view(world, rows)[r] // rows == rank).sum() for r in range(world)]
        assert sent[0] == [int(n) for n in wanted], "a row goes where it is needed and nowhere else"
        assert sum(sent[0]) - sent[0][rank] <= rows
    assert distributed.all_gather(mine).equal(everything)
    assert distributed.largest(131 * (rank == world - 1), 0) == [131, 0]
    assert distributed.from_main({"rank": rank}) == {"rank": 0}
    assert distributed.mean_over_ranks(torch.tensor([rank + 1.0, 2.0])).tolist() == [(world + 1) / 2, 2.0]
    assert distributed.sum_over_ranks(torch.tensor(2)).item() == 2 * world
    assert distributed.same_on_all_ranks(everything)
    assert not distributed.same_on_all_ranks(torch.tensor([float(rank), 1.0]))
    assert not distributed.same_on_all_ranks(torch.tensor([1.0, 2.0] if rank else [2.0, 1.0]))  # the same sum
    with open(os.path.join(folder, f"{rank}.done"), "w"):
        return 0


@pytest.mark.dist
@pytest.mark.parametrize("world", [2, 3, 8])
def test_exchanges_between_processes(world, tmp_path, start):
    program = start("--nproc", world, "unused", main=functools.partial(permuting, str(tmp_path)))
    assert program.end() == 0, program.text
    assert len(list(tmp_path.glob("*.done"))) == world


def test_exchanges_of_one_process():
    x = torch.arange(6).view(3, 2)
    assert distributed.exchange_rows(x, torch.tensor([2, 0, 1])).tolist() == [[4, 5], [0, 1], [2, 3]]
    assert distributed.all_gather(x) is x
    assert distributed.largest(144, 0) == [144, 0]
    assert distributed.same_on_all_ranks(x)


# ---------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def mistake(in_process, capsys, tmp_path, image_folder):
    """``mistake(*words)``: the sentence that this input costs; nothing else may be said and nothing trained."""

    def make(*words: object, folder: object = image_folder) -> str:
        capsys.readouterr()
        where = [] if "--save-dir" in words else ["--save-dir", tmp_path / "run"]
        try:
            code = in_process(*([folder] if folder else []), *TINY, *STEPS, *where, *words)
        except SystemExit as stopped:
            code = stopped.code
        said = capsys.readouterr()
        assert code == 2, said.out
        assert re.fullmatch(r"error( \(rank 0\))?: [^\n]*\n", said.err), said.err
        assert "images/s" not in said.out
        return said.err

    return make


def test_a_folder_that_is_not_there(mistake, tmp_path):
    assert "nowhere" in mistake(folder=tmp_path / "nowhere")


def test_a_folder_without_images(mistake, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty" in mistake(folder=tmp_path / "empty")


def test_a_folder_with_other_files(mistake, tmp_path):
    (tmp_path / "texts" / "train" / "a").mkdir(parents=True)
    (tmp_path / "texts" / "train" / "a" / "x.txt").write_text("hello")
    assert "texts" in mistake(folder=tmp_path / "texts")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["-a", "resnet51"], r"-a resnet51: no torchvision or timm network has this name; close ones: .*resnet"),
        (["-b", 64], r"24 images, fewer than one batch of 64; give a --batch-size of at most 24"),
        (["--accum", 4], r"--accum 4 is more than the 3 batches of an epoch"),
        (["--bn-splits", 3], r"--bn-splits 3 does not divide a batch of 8"),
        (["--bn-splits", 8], r"--bn-splits 8 does not divide a batch of 8 into equal parts of two or more"),
        (["-a", "test_vit", "--stem", "cifar"], r"--stem cifar is for ResNet-like networks.*test_vit has none"),
        (["--head-impl", "triton"], r"--head-impl"),
        (["--head-precision", "tf32"], r"--head-precision tf32 needs a GPU and this process runs on cpu; use auto"),
        (["--head-precision", "tf32x3"], r"--head-precision tf32x3 needs a GPU and this process runs on cpu; use auto"),
        (["--mean", 0.5], r"--mean and --std take one value a channel, and these images have 3"),
        (["--resume", "nothing.pth.tar"], r"no checkpoint at nothing.pth.tar"),
        (["--n1", 4], r"--n-hard 1024 is more than the queue's 20 rows"),
        (["--nproc", 0], r"--nproc .* at least 1, not 0"),
        (["--max-restarts", 1], r"--max-restarts needs --nproc: .* Under torchrun give --max-restarts to torchrun"),
        (["--max-restarts", -1], r"--max-restarts must be at least 0, not -1"),
        (["--world-size", 2], r"--world-size above 1 needs --rank and --dist-url"),
        (["--multiprocessing-distributed", "--world-size", 2, "--rank", 0], r"several nodes need --dist-url"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_flags_that_cannot_be(words, sentence, mistake):
    assert re.search(sentence, mistake(*words))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(mistake):
    assert "this machine has no GPU; leave the flag out" in mistake("--gpu", 0)


def test_a_data_set_that_was_not_fetched(mistake, tmp_path):
    assert "--download" in mistake("--dataset", "cifar10", tmp_path, folder=None)


def test_a_port_in_use(mistake):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        url = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        sentence = mistake("--world-size", 2, "--rank", 0, "--dist-url", url)
    assert f"the processes cannot meet at {url}" in sentence
    assert "in use; give another port by --dist-url" in sentence


def test_resuming_what_does_not_fit(mistake, in_process, image_folder, tmp_path):
    assert in_process(*TINY, *STEPS, "--save-dir", tmp_path / "one", image_folder) == 0
    path = tmp_path / "one" / "checkpoint_0000_step_00000002.pth.tar"
    assert "--arch test_resnet and this one has test_vit" in mistake("--resume", path, "-a", "test_vit")
    assert "--moco-k 20 and this one has 22" in mistake("--resume", path, "--moco-k", 22)
    assert "entries differ); check -a, --mlp, --stem, --method and --ema" in mistake("--resume", path, "--ema", 0.9)
    assert "3 steps an epoch; this run has 24 images, 12 images a batch" in mistake("--resume", path, "-b", 12)
    path.write_bytes(path.read_bytes()[:100_000])
    for words in (["--resume", path], ["--resume", "auto", "--save-dir", tmp_path / "one"]):
        sentence = mistake(*words)
        assert str(path) in sentence
        assert "truncated" in sentence


def test_another_runs_folder(mistake, in_process, image_folder, tmp_path):
    words = [*TINY, "--save-dir", tmp_path, image_folder]
    assert in_process(*words, *STEPS) == 0
    sentence = mistake("--save-dir", tmp_path)
    assert "already holds checkpoint_0000_step_00000002.pth.tar" in sentence
    assert load(tmp_path)["run"]["step"] == 2
    assert in_process(*words, "--steps", 1, "--overwrite") == 0
    assert [p.name for p in tmp_path.glob("*.tar")] == ["checkpoint_0000_step_00000001.pth.tar"]


def test_folders_that_cannot_be_written(mistake, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be made" in mistake("--save-dir", tmp_path / "file")
    assert "cannot be made" in mistake("--save-dir", tmp_path / "file" / "run")


def test_too_many_unreadable_images(in_process, image_folder, tmp_path, capsys):
    shutil.copytree(image_folder / "train", tmp_path / "pictures")
    for n in range(4):
        (tmp_path / "pictures" / "red" / f"{n}.png").write_bytes(b"torn")
    words = [*TINY, "--epochs", 1, "--save-dir", tmp_path / "run", tmp_path / "pictures"]
    assert in_process(*words, "--max-bad-images", 4) == 0
    said = capsys.readouterr()
    assert said.out.count("unreadable image replaced") == 4
    assert in_process(*words, "--max-bad-images", 2, "--overwrite") == 2
    assert re.fullmatch(r"error: 3 images .* cannot be read, the limit is 2[^\n]*\n", capsys.readouterr().err)


@pytest.mark.dist
def test_a_mistake_seen_by_two_processes_is_told_once(image_folder, tmp_path, start):
    program = start(*TINY, "--nproc", 2, "-b", 7, "--save-dir", tmp_path, image_folder)
    assert program.end() == 2
    assert re.fullmatch(r"(rank \d is process \d+\n)*error: [^\n]*7 cannot be divided[^\n]*\n", program.text)


@pytest.mark.dist
def test_the_rest_of_an_epoch_needs_the_same_processes(image_folder, tmp_path, start, in_process, capsys):
    words = [*TINY, "--save-dir", tmp_path, image_folder]
    assert start(*words, *STEPS, "--nproc", 2).end() == 0
    assert in_process(*words, "--steps", 4, "--resume", "auto") == 2
    assert "2 processes, 3 steps an epoch" in capsys.readouterr().err
    assert start(*words, "--steps", 3, "--nproc", 2, "--resume", "auto").end() == 0
    assert in_process(*words, "--steps", 4, "--resume", "auto") == 0  # between epochs all is free
    run = load(tmp_path)["run"]
    assert [run.pop(name) for name in ("flags", "data", "torch", "images", "processes", "head", "pretraining")]
    assert run | {"bad_images": 0} == {
        "losses": [], "plateau": {},
        "seed": 3, "batch": 1, "step": 4, "draw": 4, "ema_due": True, "bad_steps": 0, "bad_images": 0,
        "batches": {"images": 24, "images a batch": 8, "batches a step": 1, "processes": 1, "steps an epoch": 3},
    }  # fmt: skip


@pytest.mark.dist
def test_two_processes_start_afresh_in_a_folder(image_folder, tmp_path, start):
    for _ in range(2):  # both processes remove the older run's files
        program = start(*TINY, *STEPS, "--nproc", 2, "--overwrite", "--save-dir", tmp_path, image_folder)
        assert program.end() == 0, program.text


def test_the_exit_codes_of_the_program_itself():
    """As a user sees it: a real process, nothing on standard output, no stack trace."""
    done = run("main_pretrain.py", *TINY, "nowhere")
    assert done.returncode == 2
    assert re.fullmatch(r"error: [^\n]*nowhere[^\n]*\n", done.stderr)


def test_compiled_encoders_train_and_keep_their_names(image_folder, tmp_path, in_process, monkeypatch):
    """Traced, with torch's own operators in place of generated code, which takes minutes to build."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, mode=None: compiled(call, backend="eager"))
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        more += ["--bn-splits", "2"]  # parts of one image would magnify the last bit of a sum in another order
        assert in_process(*TINY, *SYNCO, *STEPS, *more, "--save-dir", tmp_path / name, image_folder) == 0
    plain, traced = (load(tmp_path / name)["state_dict"] for name in ("plain", "compiled"))
    assert list(plain) == list(traced)
    for name, value in plain.items():
        torch.testing.assert_close(traced[name], value, rtol=1e-3, atol=1e-4)
