"""Run ``isomerge-mergekit-yaml`` as ``python -m isomerge_fast.integrations.mergekit``."""

from . import main

if __name__ == "__main__":
    main()
