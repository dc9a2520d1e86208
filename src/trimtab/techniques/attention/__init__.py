"""Techniques of this seam: one technique, one file."""
