"""Which models with planted behaviours come with the library?  `names()` lists them and `load(name)` loads one.

Each of them comes with its detectors, prompts and measured rates.
"""

from melbo_lens.organisms.organism import Organism, load, names

__all__ = ["Organism", "load", "names"]
