"""Networks, by name, and where their published weights are."""
