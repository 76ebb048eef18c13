"""Kernels: each written twice, as a naive twin anyone can read (``reference``) and as the fast one.

A caller names what it wants; which operators run, and where the naive form is the better one, is decided in here.
"""
