"""The change: one technique, one file; folders are named after seams."""
