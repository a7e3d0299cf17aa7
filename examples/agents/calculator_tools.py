"""The tools of the calculator example."""


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b
