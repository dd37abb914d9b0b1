"""One concern of a run in each file."""
