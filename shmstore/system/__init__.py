"""What the operating system and the interpreter give: clock, processes, signals, locks between threads. Private."""
