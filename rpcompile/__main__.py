"""`python -m rpcompile` is the command `rpcompile`."""

from __future__ import annotations

import sys

from rpcompile.cli import main

if __name__ == "__main__":
    sys.exit(main())
