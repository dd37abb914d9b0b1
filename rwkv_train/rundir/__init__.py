"""What a run leaves on disk over all its attempts: directory, records, history, status."""
