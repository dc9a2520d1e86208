"""The skeleton: operators of a model, counted and fused."""
