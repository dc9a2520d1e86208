"""On paper: time, memory, energy and money of a plan."""
