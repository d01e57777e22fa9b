"""What was shown, and what became of it: the log of answers, and its join with actions."""
