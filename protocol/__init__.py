"""What crosses a process boundary: calls, messages, wire format, links, error codes."""
