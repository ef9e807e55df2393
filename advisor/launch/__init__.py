"""A plan to the text that launches it, one target a file."""
