"""The four kinds of process of a host instance; one folder each, and the runtime they share."""
