"""Training: what is learned on top of a model, its weights frozen."""
