"""advisor: whether a training run fits, what is fastest, and what to type."""
