"""The rules of watchdog/ over thousands of schedules, without processes: seeded, and the same classes that run."""
