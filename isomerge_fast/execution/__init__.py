"""Runs plans and checks outputs: work items, sources and sinks of files, the report, verification."""
