"""Under which name does Inspect find steered models?  `melbo/MODEL`; what they need is imported when one is asked for.

Inspect loads this file, an entry point of the package, in every run; so it imports next to nothing.
"""

from importlib import import_module

from inspect_ai.model import ModelAPI, modelapi


@modelapi(name="melbo")
def melbo() -> type[ModelAPI]:
    """Returns the class of steered models."""
    return import_module("melbo_lens.serving.inspect_model").SteeredModelAPI
