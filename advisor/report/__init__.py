"""Numbers to something to look at."""
