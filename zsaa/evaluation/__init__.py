"""What a model is worth at each setting of the dial, and what its rivals are at equal cost."""
