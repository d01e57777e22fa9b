"""The measurements of a GPU run, one file per phase or kind."""
