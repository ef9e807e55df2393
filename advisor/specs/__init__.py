"""What is asked: frozen values that refuse nonsense. No cost, no files."""
