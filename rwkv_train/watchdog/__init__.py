"""Who writes, who waits, who is missing: the rules as plain functions of messages and times.

No torch, no Lightning, no clock and no file system here, so that tests/watchdog can run the same classes over
thousands of schedules of a thousand ranks. guard.py is the exception: the small process beside each rank that gives the
watchdog its clock, its network and its hands.
"""
