"""Quality through the cache: one context, several questions, scored beside bytes and time."""
