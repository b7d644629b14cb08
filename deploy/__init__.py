"""What starts, watches and stops a cluster, and the command people type."""
