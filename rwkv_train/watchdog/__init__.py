"""The watchdog: finds ranks that hang, are stopped or are lost, names them, and ends the run.

verdict.py has the rules, as plain functions of messages and times: no torch, no Lightning, no clock and no file system,
so that tests/watchdog can run the same classes over thousands of schedules of a thousand ranks. monitor.py is the small
process beside each rank that measures time, talks to the other monitors and acts; heartbeat.py is what it reads.
"""
