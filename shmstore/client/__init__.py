"""What another process does with a server: connect, start and watch it, and use its store. Private."""
