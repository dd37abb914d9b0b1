"""The rules of supervision/ over thousands of schedules, without processes: seeded, and the same classes that run."""
