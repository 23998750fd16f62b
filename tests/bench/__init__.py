"""Benchmarks: what ebi takes, beside what its peers take, in one run on one machine.

`python -m tests.bench images` and `longhorn` measure and leave results; `report` writes docs/benchmarks.md from them.
"""
