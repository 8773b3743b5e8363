"""The bundled reference model: a small Llama that recalls facts from contexts of up to 1,024 words."""

from pathlib import Path

MODEL = Path(__file__).with_name("model")

__all__ = ["MODEL"]
