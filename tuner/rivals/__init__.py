"""Rivals with an environment of their own, one a file: each defines ``RIVAL`` (tuner/bench_rivals.py), ``NEEDS`` and ``BACKWARD``.

A file imports torch and the benchmark's case; the rival's package is imported when its boundary is made: ImportError where it is missing.
"""
