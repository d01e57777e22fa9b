"""Runs the same workload with other load generators: MLPerf's loadgen and Locust."""
