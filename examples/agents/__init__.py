"""Agents: tiny models that learn to call a tool, and to write code that passes its tests."""
