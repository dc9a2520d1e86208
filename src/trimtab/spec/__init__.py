"""The question: what a model is, what runs it, what is asked of it and what comes back. No torch, no numpy."""
