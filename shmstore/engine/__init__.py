"""The sessions of a store as records in one memory-mapped file. Private."""
