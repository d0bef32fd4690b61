"""Training backbones too, over one process or many."""
