"""What a dial is set to, and what it shows of its passes."""
