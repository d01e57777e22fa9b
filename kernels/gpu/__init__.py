"""GPUs: one engine over PyTorch or TensorRT, and the fused Triton kernel of the early-fused encoder."""
