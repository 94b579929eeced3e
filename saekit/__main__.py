"""`python -m saekit` is the command line."""

import sys

from saekit.cli import main

sys.exit(main())
