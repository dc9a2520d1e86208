"""The ninety papers: what each claims and what was confirmed."""
