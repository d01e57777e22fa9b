"""The producer of pin vectors: a network over each pin and its neighbours (PinSage), trained for several tasks."""
