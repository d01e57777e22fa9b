"""What the phases of a GPU run measure."""
