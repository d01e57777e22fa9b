"""Actions of users, which are folded into the users' stored sequences."""
