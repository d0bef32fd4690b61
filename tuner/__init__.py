"""The service: search, tracking, registry and command line."""
