"""funasr-batch: transcribe whole folders of recordings with FunASR's models on Apple MLX."""

__version__ = "0.1.0"
