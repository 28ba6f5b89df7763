"""`python -m penstock.engine --model DIR`: an engine in a process of its own."""

from __future__ import annotations

import sys

from penstock.engine.args import main

if __name__ == "__main__":
    sys.exit(main())
