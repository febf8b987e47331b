"""The queue, the schedules and the keyed generators, against definitions written as loops."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from moco import seeding
from moco.models.key_queue import EMPTY, enqueue_, new_queue, next_rows, read_queue
from moco.train.plan import learning_rate


def test_rows_are_unit_at_birth():
    queue = new_queue(50, 8, torch.Generator().manual_seed(0))
    torch.testing.assert_close(queue.norm(dim=1), torch.ones(50))


@pytest.mark.parametrize("sizes", [[4, 4, 4], [3, 5, 2, 7], [10, 1, 10], [25, 3], [7, 31, 6]])
def test_queue_holds_the_newest_keys_whatever_the_batch_sizes(sizes):
    K, C = 10, 3
    generator = torch.Generator().manual_seed(0)
    queue, ids, pointer = new_queue(K, C, generator), torch.full((K,), EMPTY), torch.zeros(1, dtype=torch.long)
    rows = [(row.clone(), EMPTY) for row in queue]  # the definition: a list with a position
    place, count = 0, 0
    for n in sizes:
        keys = torch.nn.functional.normalize(torch.randn(n, C, generator=generator), dim=1)
        expected_rows = next_rows(queue, pointer, n).tolist()
        assert expected_rows == [(place + i) % K for i in range(min(n, K))]
        enqueue_(queue, ids, pointer, keys, torch.arange(count, count + n))
        for i in range(n):
            rows[place] = (keys[i], count + i)
            place = (place + 1) % K
        count += n
        assert int(pointer) == place
        assert torch.equal(queue, torch.stack([r for r, _ in rows]))
        assert ids.tolist() == [i for _, i in rows]
    torch.testing.assert_close(queue.norm(dim=1), torch.ones(K))


def test_old_mass_and_false_negatives_against_sums_over_rows_by_their_age():
    """Rows are listed by when they came in; own images' rows count nowhere, nor has the middle row of an odd queue an
    age."""
    K, C, T, hard = 7, 4, 0.3, 5
    labels = torch.arange(100) % 3
    generator = torch.Generator().manual_seed(0)
    queue, ids, pointer = new_queue(K, C, generator), torch.full((K,), EMPTY), torch.zeros(1, dtype=torch.long)
    q, own = new_queue(3, C, generator), torch.tensor([12, 9, 99])
    came: list[tuple[torch.Tensor, int]] = []
    for first in (0, 6, 10):  # 6, 4 and 5 keys: the queue has gone round, and its oldest row is in its middle
        keys = new_queue(5 if first == 10 else 6 - first // 3, C, generator)
        enqueue_(queue, ids, pointer, keys, torch.arange(first, first + len(keys)))
        came += [(key, first + i) for i, key in enumerate(keys)]
        if first == 0:
            assert read_queue(q, own, queue, ids, pointer, T) is None  # a row is left that was drawn at random
    assert int(pointer) not in (0, K - 1)
    shares, alike, counted = [], 0, 0
    for query, image in zip(q, own.tolist(), strict=True):
        mass = [0.0 if i == image else math.exp(float(query @ key) / T) for key, i in came[-K:]]
        shares.append(sum(mass[:3]) / (sum(mass[:3]) + sum(mass[4:])))
        nearest = sorted(((float(query @ key), i) for key, i in came[-K:] if i != image), reverse=True)[:hard]
        alike, counted = alike + sum(i % 3 == image % 3 for _, i in nearest), counted + len(nearest)
    found = read_queue(q, own, queue, ids, pointer, T, labels, hard)
    assert found == pytest.approx((sum(shares) / 3, alike / counted), rel=1e-5)
    assert 0 < alike < counted == 15
    assert read_queue(q, own, queue, ids, pointer, T) == (found.old_mass, None)
    every = read_queue(q, own, queue, ids, pointer, T, labels, 99)  # more than there are: all but the own rows
    rows = [(i, image) for _, i in came[-K:] for image in own.tolist() if i != image]
    assert every.false_negatives == pytest.approx(sum(i % 3 == image % 3 for i, image in rows) / len(rows))
    one = read_queue(q[:1], ids[:1], queue[:1], ids[:1], torch.zeros(1, dtype=torch.long), T, labels, 1)
    assert one is not None and all(map(math.isnan, one))  # no halves, and no rows but the query's own


def test_cosine_is_upstreams_for_every_epoch():
    for epoch in range(200):
        expected = 0.03 * 0.5 * (1.0 + math.cos(math.pi * epoch / 200))
        assert learning_rate(0.03, epoch, 200, cosine=True, milestones=[120]) == expected


def test_milestones_are_upstreams_for_every_epoch():
    for epoch in range(200):
        lr = 0.03
        for milestone in (120, 160):
            lr *= 0.1 if epoch >= milestone else 1.0
        assert learning_rate(0.03, epoch, 200, cosine=False, milestones=[120, 160]) == pytest.approx(lr, rel=1e-12)


def test_keys_differ_by_stream_and_place():
    places = [("view", 0, 1, 2), ("view", 0, 2, 1), ("view", 1, 1, 2), ("draws", 0, 1, 2), ("view", 0, 1)]
    assert len({seeding.key(*p) for p in places}) == len(places)
    assert seeding.key("view", 3, 4) == seeding.key("view", 3, 4)


def test_neighbouring_keys_give_unrelated_numbers():
    draws = np.array([seeding.numpy_generator("view", 0, 0, i).random() for i in range(4000)])
    assert abs(draws.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.05


def test_the_generator_for_now_draws_what_a_new_one_draws():
    for place in ((0, 1, 2), (7, 0, 2**40), (0, 1, 2)):
        fresh, now = seeding.numpy_generator("view", 3, *place), seeding.numpy_generator_for_now("view", 3, *place)
        assert np.array_equal(fresh.random(38), now.random(38))
        assert (
            fresh.integers(1000, size=3, dtype=np.uint32).tolist()
            == now.integers(1000, size=3, dtype=np.uint32).tolist()
        )
        assert fresh.normal() == now.normal()


def test_each_thread_has_a_generator_for_now():
    mine = seeding.numpy_generator_for_now("view", 0, 1)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(seeding.numpy_generator_for_now, "view", 0, 2).result()
    assert mine is not other
    assert mine.random() == seeding.numpy_generator("view", 0, 1).random()


def test_a_resumed_run_keeps_its_seed():
    assert seeding.choose_seed(5, None) == 5
    assert seeding.choose_seed(5, {"run": {"seed": 9}}) == 9
    assert seeding.choose_seed(None, {"run": {"seed": 9}}) == 9
    assert seeding.choose_seed(None, None) != seeding.choose_seed(None, None)
