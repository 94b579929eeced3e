"""Training: the step, its schedules, exact checkpoints, tracking, and the run that ties them together."""
