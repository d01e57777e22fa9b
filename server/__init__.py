"""The ranking server: from bytes on the wire to an ordered answer."""
