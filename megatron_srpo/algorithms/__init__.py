"""What an algorithm is: groups, credit, teacher sources, one file a method."""
