"""Networks, by name, and the weights they may start from."""
