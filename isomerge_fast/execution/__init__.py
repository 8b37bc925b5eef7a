"""Run plans and check outputs: work items, sources and sinks, the report, verification."""
