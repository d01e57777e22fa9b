"""The ranker's network: as published, and in its serving form."""
