"""Who is scored when: admission, the batch policy, and the engine's streams."""
