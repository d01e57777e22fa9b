"""From published logs to atomic files, one file per log."""
