"""How a process lives: the command line, assembling a run, stopping, the watchdog, doctor."""
