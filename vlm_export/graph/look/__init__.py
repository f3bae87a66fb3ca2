"""What a model is, and which of its nodes match a pattern."""
