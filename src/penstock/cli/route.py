"""`penstock route`: one address for many engines."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import tyro

from penstock.router import RouterArgs, launch_router


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and relay; the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    args = tyro.cli(RouterArgs, prog="penstock route", args=argv)
    return launch_router(args)
