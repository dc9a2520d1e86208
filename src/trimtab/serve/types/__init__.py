"""Requests and answers of the HTTP interface: OpenAI's, with the extra fields that vLLM's clients send."""
