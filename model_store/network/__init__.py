"""Whether a network is fit to run: allowed operators only, and a bound on the memory of its largest run."""
