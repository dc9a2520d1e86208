"""Files that others load: Hugging Face folders, GGUF, and a form of our own for what neither can say."""
