"""The bipartite graph of pins and what they share, random walks over it, and the neighbours that these find."""
