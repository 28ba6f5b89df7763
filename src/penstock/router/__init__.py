"""One address for many engines: requests relayed byte for byte to a fleet of workers."""

from penstock.router.args import RouterArgs
from penstock.router.server import launch_router

__all__ = ["RouterArgs", "launch_router"]
