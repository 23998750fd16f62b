"""`python -m plugin.cli`: the command `ebi`."""

import sys

from plugin.cli import main

sys.exit(main())
