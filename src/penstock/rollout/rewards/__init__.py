"""Rewards: what a sample is worth, from its text, from programs that may hang or crash, and from services."""
