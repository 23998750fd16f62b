"""csi-sanity against the running driver."""
