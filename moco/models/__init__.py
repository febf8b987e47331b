"""The networks: encoder, projection head, BatchNorm, momentum encoder with its queue, in-batch contrast."""
