"""Backing images: manifests, the catalog, sources and formats, and the engine that copies, encrypts and decrypts.

`store.Images` is the way in. Nothing is imported here, since the copy engine's workers start with a few modules only.
"""
