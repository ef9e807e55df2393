"""The model of the step held against the real code."""
