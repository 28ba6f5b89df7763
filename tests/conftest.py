"""Settings of the whole suite."""

from __future__ import annotations

import os
import signal

from hypothesis import settings

# The suite tries the same examples at every run, so that a change that is not at fault cannot turn it red;
# `make fuzz` tries new ones.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.register_profile("fuzz", deadline=None, print_blob=True, max_examples=1000)
settings.load_profile(os.environ.get("PENSTOCK_HYPOTHESIS", "suite"))

# A shell that runs the suite in the background lets it ignore Ctrl-C, and all that it starts: tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Workers share the cores: torch's own threads would only make them wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

for name in [name for name in os.environ if name.startswith("OTEL_")]:
    del os.environ[name]  # a developer's own collector wants no spans of the tests' routers
