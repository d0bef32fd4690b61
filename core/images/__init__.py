"""From picture files to pixels, and how training sees them."""
