"""Train experts on real data, merge their files and score the results, all in a minute: `run_demo(out)`."""

from .run import DemoResult, DemoRow, run_demo

__all__ = ["DemoResult", "DemoRow", "run_demo"]
