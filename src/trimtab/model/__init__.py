"""The reference decoder in torch, and the variants of a loaded model."""
