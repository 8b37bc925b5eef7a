"""Reads LoRA adapters, and writes the settings of a merged one."""
