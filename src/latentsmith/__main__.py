"""`python -m latentsmith` is the command `latentsmith`."""

import sys

from latentsmith.cli import main

sys.exit(main())
