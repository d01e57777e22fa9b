"""The services on the wire: from bytes to bytes, and every call's one status."""
