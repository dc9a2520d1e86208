"""The explorer: typed JSON under ``/api/`` and the page under ``/ui/``."""
