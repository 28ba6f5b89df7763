"""Engine servers and their life cycle."""
