"""What commands end with, besides 0; any other code is a failure that another try may mend."""

USER_ERROR = 2
"""A user's mistake: every try would end so."""
GATE = 3
"""A score does not pass the gate that `medsynth evaluate --gate` set: not to be released."""
PREEMPTED = 75
"""Preempted and saved: the next start goes on. (EX_TEMPFAIL of sysexits.)"""
INTERRUPTED = 130
"""Ended at the keyboard, by Ctrl-C, and saved if there was something to save. (128 + SIGINT, as shells have it.)"""
NO_PROGRESS = 76
"""Started again and again without a new checkpoint: to be looked at, not tried again."""
