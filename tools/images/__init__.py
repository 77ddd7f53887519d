"""Images that the tools read or compose."""
