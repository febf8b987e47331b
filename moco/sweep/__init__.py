"""Sweeps: a grid of settings over an entry point, chosen on a validation figure, reported by a test figure.

    python -m moco.sweep SPEC.yml [--out DIR] [--gpus ID ...] [--slots N] [--dry-run] [-- DIR --pretrained CKPT ...]

Words after ``--`` go to every trial. One trial is one process of the entry point in its own folder; files, in the order
of a sweep: spec.py (what to run), paired.py (what is compared with what), commands.py (its words), figures.py (what it
writes), trial.py (one run), pool.py (where and when), report.py (selection and tables).
Exit codes: 0 all trials done; 1 some failed; 2 a spec that cannot be used; 129, 130 and 143 stopped by SIGHUP, Ctrl-C
and SIGTERM; a second of them gives the trials no more time to save.
"""
