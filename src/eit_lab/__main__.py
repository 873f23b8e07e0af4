"""``python -m eit_lab COMMAND``."""

import sys

from eit_lab.cli import main

sys.exit(main())
