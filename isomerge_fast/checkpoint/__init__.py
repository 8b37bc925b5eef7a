"""Read, check and write checkpoints on disk: headers (``layout``), bytes (``io``), adapters (``lora``), what keeps
inputs from being merged (``checks``), and the output's folder (``output``).
"""
