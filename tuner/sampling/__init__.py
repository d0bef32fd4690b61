"""Who proposes trials, and who stops them."""
