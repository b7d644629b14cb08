"""What several processes map, or must agree on bit for bit."""
