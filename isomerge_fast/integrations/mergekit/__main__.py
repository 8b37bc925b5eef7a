"""Run ``isomerge-mergekit-yaml`` as ``python -m isomerge_fast.integrations.mergekit``."""

from . import main

main()
