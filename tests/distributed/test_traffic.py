"""The bytes of docs/scaling.md against those that the kernel says each process wrote to its sockets."""

import functools
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, TINY

import main_pretrain
from benchmarks.speed.traffic import main, numbers_of_probe, per_step, upstreams
from moco import cli, distributed
from moco.models.encoder import feature_width
from moco.train.online_probe import OnlineProbe
from moco.train.pretraining import Trainer

WIDTH, SIZE, STEPS = 128, 32, 3
HEADERS = 1000  # bytes a process and exchange, of gloo's messages


def written() -> int:
    """Bytes that this process has given to write and its like, sockets among them."""
    return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])


def counting(folder: str, args) -> int:
    """A worker that notes what each exchange of a real run sends, and then what upstream's shuffle would send."""
    sent: dict[str, list[float]] = {}

    def counted(call, name_of):
        @functools.wraps(call)
        def inner(x, *others, **named):
            before = written()
            result = call(x, *others, **named)
            sent.setdefault(name_of(x), []).append(written() - before)
            return result

        return inner

    distributed.exchange_rows = counted(
        distributed.exchange_rows, lambda x: "shuffle of images" if x.dim() == 4 else "shuffle of keys"
    )
    distributed.all_gather = counted(
        distributed.all_gather, lambda x: f"gather of {'keys' if x.is_floating_point() else 'ids'}"
    )
    distributed.max_over_ranks = counted(distributed.max_over_ranks, lambda x: "flags")
    classify = OnlineProbe.add  # its backward sends nothing
    backward = torch.Tensor.backward

    def unseen(self, *given, **named):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "backward", backward)
            classify(self, *given, **named)

    OnlineProbe.add = unseen
    OnlineProbe.step = counted(OnlineProbe.step, lambda self: "online probe")
    torch.Tensor.backward = counted(torch.Tensor.backward, lambda x: "gradients")  # type: ignore[method-assign]
    Trainer.check_queues = lambda self: None  # a gather of its own, now and then
    sizes = {}
    original = Trainer.step

    def step(self, batches):
        original(self, batches)
        sizes.update(P=sum(p.numel() for p in self.parameters), N=len(self.last.q), K=self.model.K)
        sizes.update(O=numbers_of_probe(len(self.probe.classes), feature_width(self.model.encoder_q)))

    Trainer.step = step
    code = main_pretrain.worker(args)
    upstream: dict[str, list[float]] = {}
    images, keys = torch.zeros(sizes["N"], 3, SIZE, SIZE), torch.zeros(sizes["N"], WIDTH)
    for name, x in (("shuffle of images", images), ("shuffle of keys", keys), ("gather of keys", keys)):
        before = written()
        dist.all_gather([torch.empty_like(x) for _ in range(dist.get_world_size())], x)
        upstream[name] = [written() - before]
    queue, before = torch.zeros(WIDTH, sizes["K"]), written()
    dist.broadcast(queue, 0)
    upstream["queue, with the buffers"] = [written() - before]
    found = {"sent": sent, "upstream": upstream, "sizes": sizes}
    Path(folder, f"{distributed.rank()}.json").write_text(json.dumps(found))
    return code


@pytest.mark.dist
@pytest.mark.parametrize("W", [2, 4])
def test_what_is_computed_is_what_is_sent(W, image_folder, tmp_path, start):
    words = [*TINY, "--size", SIZE, "-b", 24, "--moco-k", 512, "--moco-dim", WIDTH, "-p", 100, "--epochs", STEPS]
    words += ["--nproc", W, "--save-dir", tmp_path / "run", image_folder]
    program = start(*words, main=functools.partial(counting, str(tmp_path)))
    assert program.end() == 0, program.text
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(W)]
    sizes = {"v": 3 * SIZE**2, "C": WIDTH, "P": ranks[0]["sizes"]["P"], "N": ranks[0]["sizes"]["N"]}
    assert sizes["N"] == 24 // W
    for key, expected in (
        ("sent", per_step(W, **sizes, O=ranks[0]["sizes"]["O"])),
        ("upstream", upstreams(W, **sizes, K=512)),
    ):
        found = {name: [mean([r[key][name] for r in ranks])] for name in ranks[0][key]}
        if key == "sent":
            assert set(found) == set(expected)
            assert all(len(r["sent"][name]) == STEPS for r in ranks for name in expected)
        for name, (value,) in found.items():
            # which rows a shuffle moves is random; of the others only the messages' headers are not in the formula
            spread = 0.5 * expected[name] if key == "sent" and name.startswith("shuffle") else 0.0
            assert -spread <= value - expected[name] <= spread + HEADERS * W, (key, name, value, expected[name])


def mean(values: list[list[float]]) -> float:
    """Over processes and steps."""
    return sum(map(sum, values)) / sum(map(len, values))


def test_one_process_sends_nothing():
    assert set(per_step(1, 32, 1000, 128, 10**6, 10**4).values()) == {0.0}
    assert set(upstreams(1, 32, 1000, 128, 10**6, 65536).values()) == {0.0}


def test_the_documents_table_is_the_computed_one(capsys):
    assert main([]) == 0
    assert capsys.readouterr().out in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", sorted((ROOT / "docs" / "launch").glob("*.sh")), ids=lambda path: path.name)
def test_the_launch_files_are_scripts_with_flags_that_exist(script):
    text = script.read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    command = re.split(r"\n\n| \|\| ", text.split("main_pretrain.py")[1])[0].replace("\\\n", " ")
    args = cli.parse_pretrain(shlex.split(command.replace('"$DATA"', "DATA")))
    assert (args.resume, args.data, args.method) == ("auto", "DATA", "synco")
