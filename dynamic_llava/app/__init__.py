"""What a person talks to: the server."""
