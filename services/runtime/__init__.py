"""The shell that every service runs in: start, control, confinement, links, logging, recording."""
