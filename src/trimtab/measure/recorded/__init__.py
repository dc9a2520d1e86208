"""Timings other people recorded: tables, fits of kernels and engines to them, and the scoreboard of every prediction."""
