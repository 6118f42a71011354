"""Networks with their weights, and what builds them."""
