"""What the interpreter's process runs is no test of this process."""

collect_ignore = ["triton_cases.py"]
