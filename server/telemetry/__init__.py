"""The server's metrics and logs."""
