"""``python -m peftlib.train``: see :mod:`peftlib.train.cli`."""

import sys

from peftlib.train.cli import main

sys.exit(main())
