"""Measure the package beside its peers; docs/benchmarks.md says how."""
