"""Users' actions: folded into their sequences, whoever brings them."""
