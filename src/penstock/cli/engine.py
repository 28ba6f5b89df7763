"""`penstock engine`: serve a checkpoint folder with the embedded engine."""

from __future__ import annotations

from penstock.engine.args import main

__all__ = ["main"]
