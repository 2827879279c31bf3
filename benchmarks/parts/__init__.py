"""The parts of the benchmark, one file each: `measure(bench)` prints the rows of its table.

To add a part, write a file here and name it in PARTS of benchmarks/__main__.py.
"""
