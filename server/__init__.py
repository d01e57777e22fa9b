"""The ranking server: answers gRPC Rank calls with candidates in order, and hot-swaps the models that rank them."""
