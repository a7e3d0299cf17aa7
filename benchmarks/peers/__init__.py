"""Comparisons with other trainers on equal work."""
