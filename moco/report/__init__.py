"""The report: one page that shows what runs did. ``python -m moco.report RUN [RUN ...]``; no torch here.

runs.py reads folders, curves.py chooses and thins what is drawn, page.py writes the file.
"""
