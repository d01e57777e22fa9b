"""pinrank's wire contracts; `pinrank.v1` holds the generated protobuf code."""
