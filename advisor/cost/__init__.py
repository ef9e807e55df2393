"""A step program on given hardware to numbers; pure functions."""
