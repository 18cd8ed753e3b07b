"""Parameter groups, and the schedules of rate and batch size."""
