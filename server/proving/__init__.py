"""Whether a new version is fit to serve: proven in a process of its own, tried on recent requests, warmed up."""
