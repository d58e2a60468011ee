"""Services of the operating system and the interpreter: clock, processes, signals, fork, log throttling. Private."""
