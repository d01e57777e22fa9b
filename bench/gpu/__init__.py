"""A benchmark of one GPU within ten minutes: phases in processes of their own, which record each number at once."""
