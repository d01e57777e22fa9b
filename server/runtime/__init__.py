"""Services of the process itself: listening addresses, signals, background threads and tasks, memory."""
