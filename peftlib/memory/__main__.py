"""``python -m peftlib.memory``: see :mod:`peftlib.memory.cli`."""

import sys

from peftlib.memory.cli import main

sys.exit(main())
