"""`python -m lmscale`: the console command where its script is not on the PATH."""

import sys

from lmscale.cli.main import main

sys.exit(main())
