"""Copies of sessions from one store to another, and snapshot files. Private."""
