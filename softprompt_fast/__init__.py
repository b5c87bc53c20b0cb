"""Soft prompts that replace long contexts, trained with losses that never build the logits.

The names are in ``__init__.pyi``, and imported when they are used: the losses need no transformers.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
