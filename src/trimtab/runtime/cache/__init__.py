"""The KV store: pages, rows, accounting."""
