"""The benchmark suite: `make bench`, `make bench-quick`, or `python -m benchmarks --help`."""
