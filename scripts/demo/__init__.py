"""The demo's parts: its world of drawn shapes, its task metric, its tokenizer and its training."""
