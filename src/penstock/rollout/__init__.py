"""RL rollouts: groups of samples with rewards, from a policy whose weights change meanwhile."""
