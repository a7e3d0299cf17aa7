"""What a process of ours ends with. 1, a defect with its traceback, is Python's own."""

DONE = 0
MISTAKE = 2  # the user's, or the machine's: told in one message; starting again changes nothing
REQUEUE = 75  # stopped on request with what was done saved: start the same command again (EX_TEMPFAIL of sysexits.h)
LOST = 76  # another rank of the run has ended, for a reason of its own
STOPPED = 130  # by Ctrl-C or SIGTERM, with a checkpoint where there was something to save

TOLD = (MISTAKE, REQUEUE, LOST, STOPPED)  # whoever ends so has said why
