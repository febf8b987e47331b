"""Where images come from: folders, lists, tar shards, named data sets; subsets and caches of them."""
