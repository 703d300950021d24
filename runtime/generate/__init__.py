"""Generating text with compiled decoders."""

from .cache import cache_slots
from .decoder import Decoder
from .eviction import Eviction
from .generate import Generation, generate
from .prompt_lookup import PromptLookup
from .sampling import Sampling

__all__ = ["Decoder", "Eviction", "Generation", "PromptLookup", "Sampling", "cache_slots", "generate"]
