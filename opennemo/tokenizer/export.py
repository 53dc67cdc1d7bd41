"""Where version 0.1 had `save_huggingface`."""

from opennemo.tokenizer.saving import save_huggingface

__all__ = ["save_huggingface"]
