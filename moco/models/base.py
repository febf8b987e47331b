"""What every model gives the training loop for a batch.

Legend: N images of this process, C feature width.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class StepOutput(NamedTuple):
    """What a step returns. ``loss`` () has the gradient; the other tensors are for the log and the queue."""

    loss: Tensor  # () what is optimised
    statistics: dict[str, Tensor]  # () each, by their names in the log
    q: Tensor  # (N, C) unit rows, detached
    paired: Tensor  # (N, C) the positives of q
    keys: Tensor  # unit rows (.., C) to be enqueued, none without a queue
