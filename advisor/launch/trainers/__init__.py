"""A plan as the files and arguments of a training program, one program a file."""
