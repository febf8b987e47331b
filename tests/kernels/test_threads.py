"""The closed forms on several cores: the numbers of one core, errors, and processes that fork.

Legend: N queries, C feature width, K queue rows.
"""

import multiprocessing
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from moco.config import SynCoConfig
from moco.kernels import closed_form, contrastive_loss
from moco.kernels import threads as workers
from moco.methods import synco
from moco.methods.negatives import draw


def unit(rows, seed):
    """(rows, 16) unit rows in float64."""
    return F.normalize(torch.randn(rows, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("masked", [False, True])
def test_several_cores_give_the_numbers_of_one(three_threads, monkeypatch, masked):
    q, k, queue = unit(11, seed=1), unit(11, seed=2), unit(130, seed=3)
    ids, queue_ids = (torch.arange(11), torch.arange(130) % 20) if masked else (None, None)
    draws = draw(synco.recipe(SynCoConfig(5, 4, 3, 2, 2, 2)), 11, 9, 16, key=4)
    results = []
    for threads, group, block in ((1, 1 << 22, 1 << 21), (3, 1 << 22, 1 << 21), (3, 4 * 130, 130), (3, 1, 1)):
        torch.set_num_threads(threads)
        monkeypatch.setattr(closed_form, "GROUP_ELEMENTS", group)
        monkeypatch.setattr(closed_form, "BLOCK_ELEMENTS", block)
        leaf = q.clone().requires_grad_()
        head = contrastive_loss(leaf, k, queue, temperature=0.2, n_hard=9, draws=draws, ids=ids, queue_ids=queue_ids)
        head.loss.backward()
        results.append([*(value.detach().double() for value in head), leaf.grad])
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_an_error_on_another_core_arrives(three_threads):
    def fail(share: slice) -> None:
        raise ZeroDivisionError(share.start)

    team = workers.Team(torch.device("cpu"))
    assert team.size == 3
    with pytest.raises(ZeroDivisionError):
        team.run(fail, team.shares(7))


@pytest.mark.parametrize(("total", "most"), [(1, None), (7, None), (256, 32), (5, 1), (100, 7), (3, 1000)])
def test_shares_cover_everything_once(three_threads, total, most):
    shares = workers.Team(torch.device("cpu")).shares(total, most)
    assert [i for share in shares for i in range(share.start, share.stop)] == list(range(total))
    assert all(share.stop - share.start <= (most or total) for share in shares)
    assert len(shares) >= min(3, total)


def test_a_forked_process_has_cores_of_its_own(three_threads):
    q, queue = unit(6, seed=1), unit(40, seed=2)
    loss = contrastive_loss(q, q, queue, temperature=0.2).loss  # starts the workers
    reader, writer = multiprocessing.get_context("fork").Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a process with threads forks is the point
        child = multiprocessing.get_context("fork").Process(target=_loss_elsewhere, args=(writer, q, queue))
        child.start()
    assert reader.poll(60)
    assert reader.recv() == pytest.approx(float(loss), rel=1e-6)
    child.join(60)


def _loss_elsewhere(writer, q, queue):
    writer.send(float(contrastive_loss(q, q, queue, temperature=0.2).loss))


def test_other_threads_keep_the_number_of_cores():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        workers._pools.pop(2, None)
        workers.Team(torch.device("cpu")).run(lambda share: share, [slice(0, 1), slice(1, 2)])
        with ThreadPoolExecutor(1) as pool:
            torch.ones(4).sum()
            assert pool.submit(_cores_of_a_new_thread).result() == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def _cores_of_a_new_thread() -> int:
    torch.ones(1 << 16).exp()  # the first parallel operator takes the default
    return torch.get_num_threads()
