"""Everything that touches a device: the engine contract, and one file per runtime that fulfils it."""
