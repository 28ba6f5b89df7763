"""More than one machine, on Ray (extra `[ray]`): engines, rollouts and batch shards as actors."""
