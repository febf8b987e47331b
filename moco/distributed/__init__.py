"""Everything that knows about ranks: how processes start, who they are, what they exchange.

The only folder that uses torch.distributed. Each function is also right for one process without a process group, so
no caller asks whether it is distributed.
"""

from moco.distributed.collectives import *  # noqa: F403
from moco.distributed.launcher import launch as launch
from moco.distributed.spawn import known_error as known_error
from moco.distributed.watch import pulse as pulse
