"""Where the parameters are on disk: found on the twin, and bound to a checkpoint."""
