"""Pure functions on tensors: routing, products with FP8 weights, and the expert MLP built from them."""
