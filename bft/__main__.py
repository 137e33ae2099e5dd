"""``python -m bft``, for ``accelerate launch -m bft train ...`` and ``torchrun -m bft ...``."""

import sys

from bft.cli import main

sys.exit(main())
