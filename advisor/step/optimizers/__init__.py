"""What each optimizer keeps, takes and moves: one module a family."""
