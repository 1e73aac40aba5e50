"""The one loop over decoder layers, and what it does to each of them."""
