"""Stores of the rows that clients keep between rounds."""

from fedsparse.federation.stores.store import ClientStore, FileStore, MemoryStore, make_store

__all__ = ["ClientStore", "FileStore", "MemoryStore", "make_store"]
