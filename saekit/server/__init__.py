"""The page with a live model behind it, for one person on one machine. Needs the extra `server`."""
