"""What ``import moco`` offers, a file for each kind; :mod:`moco` has the names."""
