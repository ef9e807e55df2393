"""Every legal plan, or the reason why it is not one, and which is best."""
