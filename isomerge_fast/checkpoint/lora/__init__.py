"""Read LoRA adapters, and write the settings of a merged one."""
