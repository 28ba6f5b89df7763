"""Settings of the whole suite."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("penstock", deadline=None, print_blob=True)
settings.load_profile("penstock")

# Workers share the cores: torch's own threads would only make them wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

for name in [name for name in os.environ if name.startswith("OTEL_")]:
    del os.environ[name]  # a developer's own collector wants no spans of the tests' routers
