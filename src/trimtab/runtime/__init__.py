"""The thing itself, in numpy and C++ only: weights, kernels, cache, text, engine. `import torch` is an error here."""
