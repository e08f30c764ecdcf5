"""`python -m coarse_train demo`; see `coarse_train.cli`."""

import sys

from .cli import main

sys.exit(main())
