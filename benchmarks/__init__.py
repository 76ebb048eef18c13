"""Measurements that peftlib's documentation quotes; `python -m benchmarks.savings` is the main one."""
