"""The course around the package: its notebooks, their runs, and what is made of their records.

The notebooks are the benchmark: `run` executes them and gathers what they record, `tables` and
`documents` write it into README.md and its like, `doctor` says whether the meter is right here.
"""
