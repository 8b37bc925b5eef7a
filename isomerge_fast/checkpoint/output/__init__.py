"""Build an output: its folder, its journal and manifest, and the files beside the weights."""
