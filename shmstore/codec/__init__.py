"""Sessions as bytes, and the names that they are found by. Private."""
