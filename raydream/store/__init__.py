"""Where a run's files live: storage on any URI, the run folder, tensors on disk."""
