"""Several drivers on one study."""
