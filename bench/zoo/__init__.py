"""Networks that people use, and habits of modules: samfn on each against a plain loop."""
