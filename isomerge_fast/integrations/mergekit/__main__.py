"""``python -m isomerge_fast.integrations.mergekit``: what ``isomerge-mergekit-yaml`` runs."""

from . import main

main()
