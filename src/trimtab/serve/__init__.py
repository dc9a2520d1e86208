"""An OpenAI-compatible HTTP server: the front (HTTP) and the engine (the model) are two processes that exchange messages."""
