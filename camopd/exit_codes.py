"""How a run is asked to stop, and what its process then ends with; no torch is imported for it."""

from __future__ import annotations


SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")  # SIGHUP: the terminal is gone
INTERRUPTED = 130  # of a process that SIGINT has ended, as shells have it
# EX_TEMPFAIL of sysexits.h: nothing is wrong, try again. What a scheduler is told to requeue.
REQUEUE = 75
# Seconds in which a signal that comes again is the same one: a scheduler sends it to a launcher and its workers, the
# launcher hands it on, and a shell whose terminal is closed sends it twice.
REPEATS = 2.0
