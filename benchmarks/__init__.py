"""How fast the pipeline is, side by side with what others do. `make bench` runs all of it.

harness.py measures, worker.py is the process that a contender lives in, ours.py and peers.py build
the training steps, bench_*.py ask one question each, run_all.py writes RESULTS.md.
"""
