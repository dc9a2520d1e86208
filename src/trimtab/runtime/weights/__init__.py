"""Weights on disk and in memory: packed buffers, GGUF and safetensors readers, loaders."""
