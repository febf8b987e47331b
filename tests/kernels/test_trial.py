"""Which implementation of the loss "auto" is on a GPU. No GPU here: a CPU plays one, with stand-ins for what is fused.

Legend: N queries, C feature width, K queue rows, H hardest rows a query, S synthetic negatives a query.
"""

import importlib
import statistics
import warnings

import pytest
import torch
from conftest import ROOT, SYNCO, TINY, interpreted, load

from moco import distributed, kernels, run_folder
from moco.errors import UserError
from moco.kernels import Choice, Earlier, Size, by_triton, choose, closed_form, contrastive_loss, trial

CPU = torch.device("cpu")
SIZE = Size(4, 200, 16, 9, (3, 2, 1, 1), False, 0.2)
AUTO = ["auto", "auto"]


@pytest.fixture(scope="module")
def rounding():
    """benchmarks/speed/loss_precision.py, which rounds as a GPU does."""
    return importlib.import_module("benchmarks.speed.loss_precision")


class Fused:
    """What stands in for fused.compute: the closed forms with a GPU's rounding, and then ``spoil``."""

    def __init__(self, monkeypatch):
        self.seen, self.shadows, self.compute, self.rounds_to = [], [], closed_form.compute, None
        self.spoil = lambda head, gradient: (head, gradient)
        monkeypatch.setattr(by_triton, "compute", self)
        monkeypatch.setattr(closed_form, "product", importlib.import_module("benchmarks.speed.loss_precision").product)

    def __call__(self, q, k, queue, temperature, hard, draws, ids, queue_ids, precision, want, shadow=None):
        self.seen.append(precision)
        self.shadows.append(shadow is not None and torch.equal(shadow, queue.bfloat16()))
        arguments = (q, k, queue, temperature, hard, draws, ids, queue_ids, self.rounds_to or precision, want)
        return self.spoil(*self.compute(*arguments))


@pytest.fixture
def gpu(monkeypatch):
    """This machine's CPU counts as a GPU with triton; returns the stand-in for the fused step, half as slow."""
    yield be_a_gpu(monkeypatch)
    forget()


def forget():
    trial.objection.cache_clear()
    trial.objection_at.cache_clear()


def be_a_gpu(monkeypatch) -> Fused:
    monkeypatch.setattr(kernels, "kind", lambda device: "cuda")
    monkeypatch.setattr(kernels, "gpu_has_bf16", lambda: True)
    monkeypatch.setattr(kernels, "_chosen", {})
    monkeypatch.setattr(by_triton, "available", lambda: True)
    monkeypatch.setattr(by_triton, "interpreted", lambda: True)
    monkeypatch.setattr(trial, "relative_time", lambda *given: 0.5)
    monkeypatch.setattr(trial, "device_time", lambda *given: 1.0)
    forget()
    return Fused(monkeypatch)


def chosen(**changes):
    given = {"impl": "auto", "precision": "auto", "device": CPU, "size": SIZE, **changes}
    return choose(**given)


# The comparison -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("width", [3, 16, 100, 128, 512])
@pytest.mark.parametrize("precision", list(trial.TOLERANCE))
def test_correct_rounding_passes_with_room(precision, width, masked, gpu):
    allowed = trial.tolerance(precision, width)
    for problem in trial.problems(width, masked):
        assert trial.difference(problem, trial.by_fused(problem, CPU, precision), allowed) <= allowed / 2


@pytest.mark.parametrize("width", [16, 128, 512])
@pytest.mark.parametrize("precision", ["fp32", "tf32x3"])
def test_coarser_operands_than_asked_for_do_not_pass(precision, width, gpu):
    gpu.rounds_to = "tf32"
    assert "differs from the reference" in trial.objection(CPU, width, False, precision)


FAULTS = {
    "the loss": lambda head, gradient: (head._replace(loss=head.loss * 1.001), gradient),
    "the gradient of one query": lambda head, g: (head, torch.cat([g[:2], 1.01 * g[2:]])),
    "a rank": lambda head, gradient: (head._replace(rank=head.rank + 1), gradient),
    "a statistic": lambda head, gradient: (head._replace(synthetic_mass=head.synthetic_mass + 1e-3), gradient),
    "not a number": lambda head, gradient: (head, gradient * torch.nan),
    "infinite": lambda head, gradient: (head._replace(loss=head.loss + torch.inf), gradient),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_is_seen(fault, gpu):
    gpu.spoil = FAULTS[fault]
    assert "differs from the reference by" in trial.objection(CPU, 32, False, "tf32x3")


@pytest.mark.parametrize("masked", [False, True])
def test_another_set_among_equals_is_seen(masked, gpu, monkeypatch):
    """The higher of two equal rows: only where hundreds are equal does it show."""

    def last_of_equals(scores, hard, maxima=None, absent=-torch.inf):
        found, rows = scores.flip(1).sort(dim=1, descending=True, stable=True)
        rows, order = (scores.shape[1] - 1 - rows[:, :hard]).sort(dim=1)
        return rows, found[:, :hard].gather(1, order)

    monkeypatch.setattr(closed_form, "hardest", last_of_equals)
    assert "differs from the reference by" in trial.objection(CPU, 32, masked, "fp32")


@pytest.mark.parametrize(
    "error", [ImportError("no module named triton"), RuntimeError("Failed to find C compiler\n...")]
)
def test_an_error_is_an_objection_in_one_line(error, gpu):
    def fails(*given):
        raise error

    gpu.compute = fails
    assert trial.objection(CPU, 16, False, "fp32") == str(error).splitlines()[0]


def test_it_is_asked_once_for_each_device_width_mask_and_precision(gpu):
    for masked in (False, True):
        for _ in range(2):
            assert chosen(size=SIZE._replace(masked=masked)).impl == "triton"
    assert len(gpu.seen) == 2 * (3 + 1)  # three small steps, and one of the run's size


def test_the_comparison_does_not_see_the_callers_modes(gpu):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert trial.objection(CPU, 16, False, "tf32x3") == ""


# The precision ------------------------------------------------------------------------------------------------------


def test_rounding_is_to_the_nearest_and_ties_go_to_even(rounding):
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(-20, 20).repeat(250)
    assert torch.equal(rounding.rounded(x, 7), x.bfloat16().float())
    assert torch.equal(rounding.rounded(-x, 10), -rounding.rounded(x, 10))
    scaled = 2.0 ** (
        10 - x.abs().log2().floor()
    )  # an x in [1, 2) times 2^10, whose whole numbers have 10 digits after it
    assert torch.equal(rounding.rounded(x, 10) * scaled, (x * scaled).round())
    assert rounding.rounded(torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11]), 10).tolist() == [1, 1 + 2.0**-9]


@pytest.mark.parametrize("kind", ["random", "clustered"])
@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_tf32x3_errs_as_fp32_does_and_the_others_do_not(kind, temperature, rounding):
    """Why "auto" is tf32x3 on a GPU."""
    rows = {p: rounding.row(kind, temperature, p, 8, 4096, 64) for p in rounding.PRECISIONS}
    errors = {p: [float(x) for cell in row[3:6] for x in cell.split(" / ")] for p, row in rows.items()}
    assert all(x <= 1.5 * y for x, y in zip(errors["tf32x3"], errors["fp32"], strict=True))
    assert errors["fp32"][1] * 100 < errors["tf32"][1] * 4 < errors["bf16"][1]  # of similarities, rms
    assert rows["tf32x3"][6] == rows["fp32"][6] == "0 %"


def test_the_table_has_every_precision(rounding, capsys):
    assert rounding.main(["--queries", "2", "--rows", "500", "--hard", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 4 * len(rounding.PRECISIONS)
    readme = (ROOT / "moco" / "kernels" / "README.md").read_text(encoding="utf-8").splitlines()
    assert lines[0] in readme


def test_the_programs_themselves_pass_when_interpreted():
    pytest.importorskip("triton", reason="needs the package triton: pip install triton")
    assert interpreted("kernels/trial_interpreted.py") >= 2


# The choice ---------------------------------------------------------------------------------------------------------


def test_the_fused_step_is_the_default_where_it_agrees_and_is_not_slower(gpu):
    assert str(chosen()) == "triton in tf32x3, checked against the reference, 0.5 of the closed forms' time"
    assert set(gpu.seen) == {"tf32x3"}
    for precision in ("fp32", "tf32", "bf16"):
        assert chosen(precision=precision)[:2] == ("triton", precision)
    assert str(chosen(impl="triton")) == "triton in tf32x3, checked against the reference"
    assert chosen(impl="cpu") == Choice("cpu", "fp32")
    assert chosen(impl="reference") == Choice("reference", "fp32")


def test_the_default_is_never_the_slower_one(gpu, monkeypatch):
    for share, name in ((1.0, "triton"), (1.3, "cpu"), (torch.inf, "cpu"), (torch.nan, "cpu")):
        monkeypatch.setattr(trial, "relative_time", lambda *given, share=share: share)
        assert chosen().impl == name
    monkeypatch.setattr(trial, "relative_time", lambda *given: 1.3)
    assert str(chosen()) == "cpu in fp32, as triton takes 1.3 times as long"
    assert chosen(impl="triton").impl == "triton"
    assert chosen(precision="tf32x3").impl == "triton"


def times_of(monkeypatch, **times):
    monkeypatch.setattr(trial, "device_time", lambda device, size, precision: times[precision])


def test_of_the_precisions_with_float32s_digits_the_default_is_the_faster_one(gpu, monkeypatch):
    times_of(monkeypatch, tf32x3=4.0, fp32=3.0)
    assert str(chosen()) == (
        "triton in fp32, checked against the reference, 0.75 of tf32x3's time and 0.5 of the closed forms' time"
    )
    assert "fp32" in gpu.seen  # compared, too
    assert chosen(precision="tf32x3")[:2] == chosen(impl="triton")[:2] == ("triton", "tf32x3")
    assert chosen(worst=lambda numbers: [4.0, 3.9] if len(numbers) == 2 else numbers).precision == "tf32x3"
    times_of(monkeypatch, tf32x3=4.0, fp32=torch.inf)
    assert chosen().precision == "tf32x3"
    times_of(monkeypatch, tf32x3=torch.inf, fp32=torch.inf)
    assert chosen().precision == "tf32x3"


def test_a_faster_precision_that_is_wrong_is_not_taken(gpu, monkeypatch):
    times_of(monkeypatch, tf32x3=4.0, fp32=3.0)
    gpu.spoil = lambda head, gradient: (head, gradient * (1.01 if gpu.seen[-1] == "fp32" else 1))
    assert chosen()[:2] == ("triton", "tf32x3")


def test_the_devices_time_is_a_median_at_the_size_of_the_run(monkeypatch):
    given, clock = [], iter(range(10**6))
    monkeypatch.setattr(trial.time, "perf_counter", lambda: next(clock) ** 2)
    monkeypatch.setattr(by_triton, "compute", lambda *arguments: given.append(arguments))
    # of the k-th call the clock shows (2k + 1)^2 - (2k)^2, after a first one that compiles
    assert trial.device_time(CPU, SIZE, "fp32") == statistics.median(4 * k + 1 for k in range(1, 1 + trial.CALLS[1]))
    assert {len(arguments[0]) for arguments in given} == {SIZE.n}
    assert {arguments[-2:] for arguments in given} == {("fp32", True)}
    monkeypatch.setattr(trial, "_of_size", lambda *given: (_ for _ in ()).throw(torch.OutOfMemoryError))
    assert trial.device_time(CPU, SIZE, "fp32") == torch.inf


def test_in_bf16_the_fused_step_needs_no_product_of_torchs(gpu, monkeypatch):
    monkeypatch.setattr(kernels, "gpu_has_bf16", lambda: False)
    monkeypatch.setattr(trial, "relative_time", lambda *given: pytest.fail("there is nothing to compare it with"))
    assert str(chosen(precision="bf16")) == "triton in bf16, checked against the reference"
    gpu.spoil = FAULTS["not a number"]
    trial.objection.cache_clear()
    with pytest.raises(UserError, match=r"--head-precision bf16 on cuda needs a GPU and torch 2.8; use auto"):
        chosen(precision="bf16")


def test_a_fused_step_that_fails_is_told_of_and_not_used(gpu, monkeypatch):
    gpu.spoil = FAULTS["a rank"]
    assert str(chosen()).startswith("cpu in fp32, not by triton: it differs from the reference by inf")
    for words in ({"impl": "triton"}, {"precision": "tf32x3"}):
        with pytest.raises(UserError, match=r"--head-\w+ \w+ cannot be had on this GPU, .* use auto"):
            chosen(**words)
    monkeypatch.setattr(by_triton, "available", lambda: False)
    assert str(chosen()) == "cpu in fp32, not by triton: the package triton is not installed (pip install triton)"
    with pytest.raises(UserError, match="pip install triton"):
        chosen(impl="triton")


def test_names_that_cannot_be_had(gpu, monkeypatch):
    with pytest.raises(UserError, match="--head-precision tf32x3 is the fused head's, --head-impl triton; use auto"):
        chosen(impl="cpu", precision="tf32x3")
    with pytest.raises(UserError, match="reference has no tf32x3"):
        chosen(impl="reference", precision="tf32x3")
    monkeypatch.undo()
    with pytest.raises(UserError, match="--head-precision tf32x3 needs a GPU and this process runs on cpu; use auto"):
        chosen(precision="tf32x3")


def test_all_processes_make_the_choice_of_the_worst(gpu):
    def with_others(*theirs):
        others = iter(theirs)
        return lambda numbers: [max(a, b) for a, b in zip(numbers, next(others), strict=True)]

    assert chosen(worst=with_others([0.0], [0, 0], [0.9])).why.endswith("0.9 of the closed forms' time")
    assert chosen(worst=with_others([0.0], [0, 0], [1.1])).impl == "cpu"
    assert str(chosen(worst=with_others([1.0]))).endswith("not by triton: another process of this run cannot use it")
    gpu.spoil = FAULTS["the loss"]
    trial.objection.cache_clear()
    assert chosen(worst=with_others([0.0])).impl == "cpu"


def test_a_resumed_run_keeps_its_choice(gpu, monkeypatch):
    monkeypatch.setattr(trial, "relative_time", lambda *given: pytest.fail("the clock decides nothing here"))
    so_far = Earlier("triton", "tf32x3", "cuda", AUTO)
    assert str(chosen(before=so_far)) == "triton in tf32x3, as so far, checked against the reference"
    slower = Earlier("cpu", "fp32", "cuda", AUTO)
    assert str(chosen(before=slower)) == "cpu in fp32, as so far"
    gpu.spoil = FAULTS["the loss"]
    trial.objection.cache_clear()
    said = str(chosen(before=so_far))
    assert said.startswith("cpu in fp32, not by triton: it differs")
    assert "(so far by triton in tf32x3, which cannot be had here: the rest is equal to rounding, not bit for" in said


def test_a_resumed_run_that_asks_for_another_gets_it(gpu):
    assert chosen(before=Earlier("cpu", "fp32", "cuda", ["auto", "fp32"])).why.endswith("0.5 of the closed forms' time")
    assert chosen(precision="bf16", before=Earlier("cpu", "fp32", "cuda", AUTO))[:2] == ("triton", "bf16")
    assert chosen(impl="cpu", before=Earlier("triton", "tf32x3", "cuda", AUTO)) == Choice("cpu", "fp32")
    assert chosen(before=Earlier("cpu", "bf16", "cpu", AUTO)).impl == "triton"  # of another kind of device


def test_a_resumed_run_keeps_the_precision_that_was_faster(gpu, monkeypatch):
    times_of(monkeypatch, tf32x3=1.0, fp32=9.0)
    assert str(chosen(before=Earlier("triton", "fp32", "cuda", AUTO))).startswith("triton in fp32, as so far, checked")
    assert set(gpu.seen) == {"fp32"}


def test_without_a_gpu_names_decide_and_a_change_is_told():
    name = kernels.resolve_precision("auto", "cpu", "cpu")
    assert chosen() == Choice("cpu", name)
    assert chosen(before=Earlier("cpu", name, "cpu", AUTO)) == Choice("cpu", name)
    assert str(chosen(before=Earlier("triton", "tf32x3", "cuda", AUTO))).startswith(
        f"cpu in {name} (so far by triton in tf32x3, which cannot be had here"
    )


# At the size of the run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "tf32x3", "bf16"])
def test_the_step_of_the_runs_size_agrees_in_every_precision(precision, masked, gpu):
    sizes = [(70, 5000, 24, 300, (8, 8, 4, 4)), (5, 40, 3, 40, (2, 0, 0, 0)), (4, 900, 16, 0, (0, 0, 0, 0))]
    for n, rows, width, hard, counts in sizes:
        size = trial.Size(n, rows, width, hard, counts, masked, 0.2)
        assert trial.objection_at(CPU, size, precision) == ""


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("fault", ["raises", "differs"])
def test_a_step_that_fails_at_the_size_of_the_run_alone_is_not_used(fault, impl, gpu):
    def spoil(head, gradient):
        if len(head.rank) != SIZE.n:  # the small steps pass
            return head, gradient
        if fault == "raises":
            raise RuntimeError("out of resource: shared memory")
        return head, gradient * 1.01

    gpu.spoil = spoil
    words = (
        "out of resource: shared memory"
        if fault == "raises"
        else "at 4 queries and 200 rows it differs from the closed"
    )
    if impl == "auto":
        assert str(chosen()).startswith(f"cpu in fp32, not by triton: {words}")
    else:
        with pytest.raises(UserError, match=words):
            chosen(impl=impl)


def test_a_launch_that_is_refused_while_timed_takes_for_ever(monkeypatch):
    def refuse(*given):
        raise RuntimeError("out of resource")

    monkeypatch.setattr(trial, "SECONDS", 0.0)
    monkeypatch.setattr(by_triton, "compute", refuse)
    assert trial.relative_time(CPU, SIZE, "fp32", "fp32") == torch.inf

    def full(*given):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(trial, "_of_size", full)
    assert trial.relative_time(CPU, SIZE, "fp32", "fp32") == torch.inf


# The clock ----------------------------------------------------------------------------------------------------------


def test_both_are_timed_at_the_size_of_the_run(gpu, monkeypatch):
    monkeypatch.undo()
    given, clock = [], iter(range(10**6))
    monkeypatch.setattr(trial, "SECONDS", 0.0)
    monkeypatch.setattr(trial.time, "perf_counter", lambda: next(clock) ** 2)
    for module in (by_triton, closed_form):
        monkeypatch.setattr(module, "compute", lambda *arguments, m=module: given.append((m, arguments)))
    size = SIZE._replace(masked=True)
    assert trial.relative_time(CPU, size, "tf32x3", "fp32") < 1  # the clock's steps grow, and the fused one is first
    assert [module for module, _ in given] == [by_triton, closed_form] * (1 + trial.CALLS[0])
    for module, (q, k, queue, temperature, hard, draws, ids, queue_ids, precision, want) in given:
        assert (q.shape, k.shape, queue.shape, draws.counts) == ((4, 16), (4, 16), (200, 16), size.counts)
        assert (temperature, hard, len(ids), len(queue_ids), want) == (0.2, 9, 4, 200, True)
        assert precision == {by_triton: "tf32x3", closed_form: "fp32"}[module]


def test_a_step_that_finds_no_memory_takes_for_ever(monkeypatch):
    def full(*given):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(trial, "SECONDS", 0.0)
    monkeypatch.setattr(by_triton, "compute", full)
    assert trial.relative_time(CPU, SIZE._replace(counts=(0, 0, 0, 0)), "fp32", "fp32") == torch.inf
    monkeypatch.setattr(by_triton, "compute", lambda *given: None)
    monkeypatch.setattr(closed_form, "compute", full)
    assert trial.relative_time(CPU, SIZE, "fp32", "fp32") == 0


# The operator -------------------------------------------------------------------------------------------------------


def call(n=4, width=16, **settings):
    q, k, queue = (torch.nn.functional.normalize(torch.randn(rows, width), dim=1) for rows in (n, n, 200))
    return contrastive_loss(q.requires_grad_(), k, queue, temperature=0.2, **settings)


def test_a_first_call_is_a_trial_and_later_ones_follow_it(gpu, monkeypatch):
    call()
    tried = len(gpu.seen)
    assert tried == 3 + 1 + 1
    call(n=7)
    assert len(gpu.seen) == tried + 1
    monkeypatch.setattr(trial, "relative_time", lambda *given: 1.5)
    call(width=32)
    call(width=32)
    assert len(gpu.seen) == tried + 1 + 3 + 1  # compared and found too slow


def test_a_first_call_that_fails_warns_once_and_goes_on(gpu):
    gpu.spoil = FAULTS["the loss"]
    with pytest.warns(RuntimeWarning, match=r"loss by cpu in fp32, not by triton: it differs from the reference"):
        loss = call().loss
    assert loss.requires_grad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()


def test_it_is_compiled_with_the_trial_inside_the_operator(gpu):
    torch.manual_seed(0)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=False)
    compiled().loss.backward()
    assert len(gpu.seen) == 3 + 1 + 1


def test_while_a_graph_is_captured_nothing_is_tried(gpu, monkeypatch):
    monkeypatch.setattr(kernels, "_capturing", lambda device: True)
    with pytest.warns(RuntimeWarning, match=r"loss by cpu in fp32, not by triton: a CUDA graph is captured before"):
        call()
    with pytest.raises(UserError, match="call contrastive_loss once before a CUDA graph is captured"):
        call(precision="tf32x3")  # which the closed forms have not
    assert gpu.seen == []
    monkeypatch.setattr(kernels, "_capturing", lambda device: False)
    call()
    monkeypatch.setattr(kernels, "_capturing", lambda device: True)
    call()
    assert len(gpu.seen) == 3 + 1 + 2


def test_float64_queries_are_not_tried(gpu):
    q, k, queue = (torch.nn.functional.normalize(torch.randn(n, 8).double(), dim=1) for n in (2, 2, 20))
    assert contrastive_loss(q, k, queue, temperature=0.2).loss.dtype == torch.float64
    assert gpu.seen == []


# Runs ---------------------------------------------------------------------------------------------------------------


def test_a_run_says_what_it_chose_and_a_resumed_one_keeps_it(
    gpu, image_folder, tmp_path, in_process, capsys, monkeypatch
):
    words = [*TINY, *SYNCO, "--save-dir", tmp_path, "--resume", "auto", image_folder, "--epochs"]
    assert in_process(*words, 1) == 0
    said = "loss by triton in tf32x3, checked against the reference, 0.5 of the closed forms' time;"
    assert said in capsys.readouterr().out
    head = {"impl": "triton", "precision": "tf32x3", "device": "cuda", "asked": AUTO}
    assert load(tmp_path)["run"]["head"] == head
    monkeypatch.setattr(trial, "relative_time", lambda *given: 2.0)
    assert in_process(*words, 2) == 0
    assert "loss by triton in tf32x3, as so far, checked against the reference;" in capsys.readouterr().out
    assert load(tmp_path)["run"]["head"] == head
    assert set(gpu.seen) == {"tf32x3"}
    monkeypatch.undo()
    assert in_process(*words, 3) == 0
    assert "(so far by triton in tf32x3, which cannot be had here: " in capsys.readouterr().out
    assert load(tmp_path)["run"]["head"]["impl"] == "cpu"


@pytest.mark.parametrize("more", [[], ["--symmetric", "--accum", "2"]], ids=["plain", "twice"])
def test_the_queue_in_bf16_is_that_of_the_step(more, gpu, image_folder, tmp_path, in_process):
    """Also where the queue wraps around (K 20, 8 keys a step), and in a resumed run."""
    words = [*TINY, *more, "--head-precision", "bf16", "--save-dir", tmp_path, "--resume", "auto", image_folder]
    for epochs in (2, 3):
        assert in_process(*words, "--epochs", epochs) == 0
    assert len(gpu.shadows) > 2 * 3
    assert all(gpu.shadows)
    assert not [name for name in load(tmp_path)["state_dict"] if "shadow" in name]


def test_a_shadow_of_another_shape_or_type_is_an_error():
    queue = torch.nn.functional.normalize(torch.randn(20, 8), dim=1)
    for shadow in (queue.bfloat16()[1:], queue.half()):
        with pytest.raises(ValueError, match=r"shadow .*: want \(20, 8\) torch.bfloat16"):
            contrastive_loss(queue[:2], queue[:2], queue, temperature=0.2, shadow=shadow)


def test_a_checkpoint_without_a_choice_goes_on(image_folder, tmp_path, in_process, capsys):
    words = [*TINY, "--save-dir", tmp_path, "--resume", "auto", image_folder, "--epochs"]
    assert in_process(*words, 1) == 0
    path = run_folder.newest(str(tmp_path))
    assert path
    state = load(path)
    assert state["run"].pop("head")["impl"] == "cpu"
    torch.save(state, path)
    assert in_process(*words, 2) == 0
    assert "so far" not in capsys.readouterr().out


def slow_on_one(args):
    """The worker of a run in which the fused step is slow on the second process alone."""
    import main_pretrain

    with pytest.MonkeyPatch.context() as patch:
        be_a_gpu(patch)
        patch.setattr(trial, "relative_time", lambda *given: 0.5 + distributed.rank())
        return main_pretrain.worker(args)


@pytest.mark.dist
def test_processes_agree_on_the_slower_ones_choice(image_folder, tmp_path, start):
    program = start(*TINY, "--steps", 1, "--nproc", 2, "--save-dir", tmp_path, image_folder, main=slow_on_one)
    assert program.end() == 0
    assert "loss by cpu in fp32, as triton takes 1.5 times as long" in program.text
