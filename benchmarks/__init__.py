"""What is fast and what is accurate beside its peers: README.md. Run as `python -m benchmarks.ROOM.NAME`."""
