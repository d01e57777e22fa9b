"""From trained parameters to a bundle in the model store."""
