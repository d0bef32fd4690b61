"""MLflow: runs, artifacts, registered models."""
