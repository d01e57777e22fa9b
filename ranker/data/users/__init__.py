"""Groups of users' features beside `user_core`: what their rows are made of, and what networks read of them."""
