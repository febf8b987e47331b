"""Controls of an ablation: copies of queue rows in the place of a method's synthetic negatives, as many of them.

Legend: N queries, K queue rows, H hardest rows a query, S synthetic negatives a query, R rows that are weighed.

A method with synthetic negatives differs from MoCo in three things at once: its softmax has S more negatives, they put
more weight on hard rows, and they are mixed. With a control the first, or the first two, are left:

========  ===================================  ==========================================================
control   the S negatives                      what a gain of the method over it says
========  ===================================  ==========================================================
random    copies of rows drawn from all K      more than S more negatives do
hardest   copies of rows drawn from the H      more than more weight on hard rows does: the rows are the
          hardest                              method's own parents, draw by draw, and nothing is mixed
reweight  the R hardest rows once more each    the same without the chance of a draw
========  ===================================  ==========================================================

A copy is the draw u = 0 q + 1 n of :class:`moco.kernels.spec.Draws`, which every implementation of the loss has. To
count a row twice is to add ln 2 to its logit. Source: none; the papers of MoCHi and SynCo report no such row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moco.kernels.spec import Draws


def rows_of(control: str | None, hard: int, total: int, count: int) -> int:
    """The size of the set that ``control`` copies from, where its method has ``hard`` (H) of ``total`` (K) rows.

    count: S. reweight takes the S hardest, each of which then counts twice. With S above H there are c = ceil(S / H)
    copies a row, of the R = ceil(S / c) hardest; of those fewer than c have one copy less, where c does not divide S.
    """
    if control == "random":
        return total
    if control != "reweight":
        return hard
    return -(-count // -(-count // hard)) if count else hard


def copies(draws: Draws, dealt: int = 0) -> Draws:
    """As many negatives as ``draws`` has, each the row that is its first parent there, with nothing mixed into it.

    dealt: deal the copies out over so many slots, one after another, in place of the drawn ones.
    """
    slots = draws.slots_a  # (N, S)
    if dealt:
        slots = torch.arange(slots.shape[1], device=slots.device).remainder(dealt).repeat(len(slots), 1)
    x = torch.zeros_like(slots, dtype=draws.query_x.dtype)

    def nothing(like: Tensor) -> Tensor:
        return like[:, :0].contiguous()

    unmixed = map(nothing, (draws.pair_y, draws.pair_z, draws.sign_v, draws.noise_w, draws.noise))
    return Draws(slots, nothing(draws.slots_b), x, x + 1, *unmixed)
