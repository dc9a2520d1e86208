"""Model families: one function each, from the keys of a Hugging Face config to a ModelSpec."""
