"""A query's hard negatives: `moco negatives`."""
