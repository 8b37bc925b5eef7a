"""Plug into other tools: mergekit, FusionBench, PEFT and Ray."""
