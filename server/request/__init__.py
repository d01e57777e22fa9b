"""One request's way: its model, its features, its scores, its order."""
