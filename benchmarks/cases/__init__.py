"""Cases to compare, drawn by rules that are written down before their outcome is known."""
