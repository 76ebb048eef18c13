"""Measurements that peftlib's documentation quotes; `python -m benchmarks.savings` is the main one."""

import os

# Read by OpenMP when torch is first imported. By default a thread that waits for another spins, and on a machine with
# other work that keeps the core from the very thread it waits for: steps took 3 to 30 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
