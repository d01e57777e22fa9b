"""What another policy would have earned on logged requests, and how certain that is."""
