"""(model, job, plan) to the program of one training step on one rank. Knows no hardware."""
