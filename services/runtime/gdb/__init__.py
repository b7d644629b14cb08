"""GDB's remote serial protocol: any process that owns something to debug serves it over a `Target`."""
