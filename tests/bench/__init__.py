"""Benchmarks: what ebi takes, beside what its peers take, in one run on one machine.

`python -m tests.bench` runs all suites and writes docs/benchmarks.md; its commands run one, or only write.
"""
