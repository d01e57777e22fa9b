"""What the process stands on: addresses, signals, background work, memory."""
