"""Which of the requests get another order than the best predicted one, which order, and how probable that was. Pure."""
