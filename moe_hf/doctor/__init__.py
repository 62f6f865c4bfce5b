"""What can be found out about an installation and a run before GPU-hours are spent on it."""
