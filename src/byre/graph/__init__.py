"""What nodes are and how they are joined."""
