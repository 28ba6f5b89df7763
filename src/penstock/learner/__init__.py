"""The reference learner: GRPO and its descendants in plain PyTorch, small enough to read in an evening."""
