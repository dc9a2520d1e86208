"""The command line: verbs are thin, the work is elsewhere."""
