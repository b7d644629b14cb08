"""Traces as people and programs want them: read, filtered, shown, counted, compared, exported."""
