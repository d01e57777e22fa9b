"""The HTTP port: metrics and probes, of one process or several, within bounds of connections, time and work."""
