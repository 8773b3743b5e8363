"""The bundled reference model: a small Llama that recalls facts from contexts of up to 1,024 words."""

from kv_gym.files import MODEL

__all__ = ["MODEL"]
