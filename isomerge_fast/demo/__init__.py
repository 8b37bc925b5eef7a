"""Experts on real data, merged, in a minute: `run_demo(out)` trains them, merges their files and scores the result."""

from isomerge_fast.demo.run import DemoResult, DemoRow, run_demo

__all__ = ["DemoResult", "DemoRow", "run_demo"]
