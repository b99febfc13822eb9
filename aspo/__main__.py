"""`python -m aspo` is the `aspo` command."""

import sys

from aspo.cli import main

sys.exit(main())
