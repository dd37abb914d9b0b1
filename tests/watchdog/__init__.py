"""The rules of watchdog/ over thousands of seeded schedules, without processes but with the classes that run."""
