"""What a process of ours ends with. 1, a defect with its traceback, is Python's own."""

DONE = 0
MISTAKE = 2  # the user's, or the machine's: told in one message; starting again changes nothing
UNHEALTHY = 69  # a machine failed its check before the run (EX_UNAVAILABLE of sysexits.h)
REQUEUE = 75  # stopped on request with what was done saved: start the same command again (EX_TEMPFAIL)
LOST = 76  # another rank of the run has ended, for a reason of its own
STOPPED = 130  # by Ctrl-C or SIGTERM, with a checkpoint where there was something to save

TOLD = (MISTAKE, UNHEALTHY, REQUEUE, LOST, STOPPED)  # whoever ends so has said why
FINAL = (MISTAKE, UNHEALTHY, REQUEUE, STOPPED)  # starting the same ranks again at once would be wrong
