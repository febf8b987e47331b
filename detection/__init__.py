"""Detection transfer: from a pretraining checkpoint to detectron2's backbone."""

from moco import doors

doors.check(__name__)
