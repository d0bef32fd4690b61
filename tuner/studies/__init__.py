"""Studies on disk and in databases: records, storage, outcomes, budgets."""
