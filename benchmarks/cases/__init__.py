"""What cases do, a family a file; which cases there are, with which numbers, stands in `benchmarks/registry.py`."""
