"""Generation over any executor: sampling, prompt and decode loops."""
