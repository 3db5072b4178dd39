"""Tests mirror the packages; `e2e/` runs whole deployments as a user would."""
