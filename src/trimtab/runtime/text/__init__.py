"""Text: tokenizers, chat templates, the built-in text and the needle prompts."""
