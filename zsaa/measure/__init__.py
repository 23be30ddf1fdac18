"""What every measurement needs: clocks, energy, intervals, where a number comes from, and files written once."""

from zsaa.measure.clock import alternate
from zsaa.measure.once import cached, code_hash, hash_of, output_folder, write_json
from zsaa.measure.origin import commit, hardware, provenance

__all__ = [
    "alternate",
    "cached",
    "code_hash",
    "commit",
    "hardware",
    "hash_of",
    "output_folder",
    "provenance",
    "write_json",
]
