"""Training: the Runner, its hooks and optimizer wrappers, checkpoints, and jobs of processes."""
