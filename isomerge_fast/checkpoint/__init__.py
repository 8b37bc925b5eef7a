"""Checkpoints on disk: what is in them (``layout``), their bytes (``reader``, ``writer``), what was done
(``manifest``), and the files beside the weights (``companions``)."""
