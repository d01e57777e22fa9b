"""Other load generators on the same workload: MLPerf's loadgen and Locust."""
