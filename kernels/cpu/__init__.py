"""CPU engines: OpenVINO with the native encoder, and NumPy, the reference implementation."""
