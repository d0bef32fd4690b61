"""Search spaces: from a YAML file to what a trial may be."""
