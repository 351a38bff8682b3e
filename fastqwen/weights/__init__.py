"""From a checkpoint's files to tensors: safetensors and GGUF, mapped into memory, every length checked before use."""
