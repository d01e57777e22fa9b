"""Load on a running server: workloads, arrival times, an open-loop generator and its reports."""
