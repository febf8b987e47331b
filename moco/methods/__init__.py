"""What differs between the papers, a file each; :mod:`moco.methods.registry` has them by name."""
