"""``python -m buffer_lifting``."""

from __future__ import annotations

import sys

from buffer_lifting.cli import main

sys.exit(main())
