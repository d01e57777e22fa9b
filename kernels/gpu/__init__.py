"""The GPU engine with its backends PyTorch and TensorRT, and the Triton kernel of the early-fused encoder."""
