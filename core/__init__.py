"""The model and data library: tables, backbones, training, metrics."""
