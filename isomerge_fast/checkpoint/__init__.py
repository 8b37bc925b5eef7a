"""Read and write checkpoints on disk.

Headers (``layout``), bytes (``io``), adapters (``lora``), what keeps inputs from being merged (``checks``), and the
output's folder (``output``).
"""
