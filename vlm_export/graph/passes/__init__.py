"""Passes over whole models: each keeps what the model computes, changes it in place and counts what it did."""
