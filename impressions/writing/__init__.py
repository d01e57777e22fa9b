"""From a server's answers to segments in the spool folder."""
