"""Which models with planted behaviours come with the library?  `load(name)` gives one with its detectors, prompts and measured rates."""

from melbo_lens.organisms.organism import Organism, load, names

__all__ = ["Organism", "load", "names"]
