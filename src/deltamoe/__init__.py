"""deltamoe."""
