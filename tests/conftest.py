"""Before torch is loaded: waiting threads give way soon, as under the command line (see ``cli.main``)."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
