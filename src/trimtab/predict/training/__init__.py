"""A training step on paper: memory, time, layouts and the network between devices."""
