"""What one GPU does, within ten minutes: named phases, each a process that appends every number once it has it."""
