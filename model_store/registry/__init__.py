"""The store of versions and labels: objects in a folder or bucket, and a history of entries that name them."""
