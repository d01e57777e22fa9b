"""Redis, one server or a cluster: bounded replies, a time budget, a circuit breaker."""
