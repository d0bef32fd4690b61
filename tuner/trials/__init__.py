"""Trials on Ray: cohorts, worker groups, and what they read."""
