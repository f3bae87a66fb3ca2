"""Changes of single nodes, tensors, shapes and interfaces; models cut and joined."""
