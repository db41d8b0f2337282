"""What was learned, handed over: pruned checkpoints, runs on the hub, models in Python."""
