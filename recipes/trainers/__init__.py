"""samfn.SAM in trainers that people have: a few lines for each, to import or to copy."""
