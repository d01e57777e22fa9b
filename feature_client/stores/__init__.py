"""Feature stores: values by key in LMDB, Redis or memory."""
