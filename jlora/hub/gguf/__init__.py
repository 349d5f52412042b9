"""GGUF, llama.cpp's files: models and adapters."""
