"""From requests of the past to trained parameters."""
