"""Demonstrations that run from a fresh installation, without a download."""
